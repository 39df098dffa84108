"""A masked-LM model of transformers as ONNX, for runtimes without Python: in fp32, and with weights in int8.

The files lie where the Hugging Face hub and its JavaScript library look for them. What onnxruntime computes from the first is
compared with torch before it counts; int8 rounds, and is not.
"""

import warnings
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modernenc.hugging_face.padded_mega import PaddedMega
from modernenc.hugging_face.parity import TOLERANCE
from modernenc.installed import check_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER, FULL, QUANTIZED = "onnx", "model.onnx", "model_quantized.onnx"
OPSET = 18
"""Version of the operators, which onnxruntime 1.14 and later have."""
_LENGTHS = (1, 2, 17, 130, 700, 2_048)


class _Logits(nn.Module):
    """The logits alone, since a graph returns tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


def write_onnx(model: "PreTrainedModel", folder: Path) -> float:
    """Write `onnx/model.onnx` and `onnx/model_quantized.onnx` into a folder, for batches and lengths of any size.

    Returns the largest difference of logits between onnxruntime and torch, relative to the largest logit or to 1; ValueError if
    it exceeds `TOLERANCE`.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    (folder / FOLDER).mkdir()
    longest = _longest(model)
    ids, kept = _batch(2, min(16, longest), model.config.vocab_size)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=longest)}
    graph = PaddedMega(model.eval()) if _is_mega(model) else _Logits(model.eval())
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program: Any = torch.onnx.export(
                graph,
                (ids, kept),
                dynamo=True,
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=(sizes, sizes),
                opset_version=OPSET,
            )
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--onnx: torch {torch.__version__} cannot write this model as ONNX: {reason}") from error
    program.save(folder / FOLDER / FULL)
    difference = _difference(model, folder / FOLDER / FULL)
    if not difference <= TOLERANCE:
        raise ValueError(f"{folder}: the logits of onnxruntime would differ from torch's by {difference:.1e}; not exported")
    quantize_dynamic(folder / FOLDER / FULL, folder / FOLDER / QUANTIZED, weight_type=QuantType.QInt8)
    return difference


def check_supported(model: Any) -> None:
    """Raise ValueError if a model cannot be written as ONNX, or if a package for it is missing."""
    check_installed("onnx")
    if not (type(model).__module__.startswith("transformers.") or _is_mega(model)):
        raise ValueError(f"--onnx: {type(model).__name__} has no form for ONNX here; leave it out")


def _is_mega(model: Any) -> bool:
    return type(model).__name__ == "MegaForMaskedLM"  # of this package, or of the code in an exported folder


@torch.no_grad()
def _difference(model: Any, file: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    largest = torch.zeros(())
    for length in (one for one in _LENGTHS if one <= _longest(model)):
        ids, kept = _batch(2, length, model.config.vocab_size)
        (theirs,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": kept.numpy()})
        ours = model(input_ids=ids, attention_mask=kept).logits[kept.bool()]
        apart = (torch.from_numpy(theirs)[kept.bool()] - ours).abs().max() / ours.abs().max().clamp(min=1)
        largest = torch.maximum(largest, apart)
    return float(largest)


def _longest(model: Any) -> int:
    return getattr(model.config, "max_positions", 0) or model.config.max_position_embeddings


def _batch(rows: int, length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return random tokens and what is kept of them; the last row is padded from its middle on."""
    ids = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(length))
    kept = torch.ones_like(ids)
    kept[-1, max(1, length // 2) :] = 0
    return ids, kept
