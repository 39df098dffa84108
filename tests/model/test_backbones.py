"""The contract of backbones, over every file of conf/backbone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from modernenc.backbones import Backbone
from modernenc.backbones.modernbert import ModernBERT
from modernenc.config import CONF_DIR
from modernenc.objectives.masked_lm import MaskedLM
from support.tensors import relative

OWN = Path(__file__).parents[1] / "own_parts" / "conf" / "backbone" / "bert.yaml"
YAMLS = [*sorted(path for path in (CONF_DIR / "backbone").glob("*.yaml") if path.stem != "of_source"), OWN]
SMALLER = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 6,
}  # fmt: skip
LENGTHS = [1, 2, 3, 17, 64, 65, 128, 130, 333, 512, 700, 1022]


@pytest.fixture(params=YAMLS, ids=lambda path: path.stem)
def objective(request) -> MaskedLM:
    return narrowed(request.param)


@pytest.fixture(params=YAMLS[:-1], ids=lambda path: path.stem)
def causal_backbone(request) -> Any:
    """The backbone of one of our YAMLs in double precision."""
    return narrowed(request.param).double().backbone


def narrowed(path: Path) -> MaskedLM:
    """Return the backbone of one YAML, narrowed, in fp32 and without dropout."""
    settings = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(settings, dict)
    target = settings.pop("_target_")
    dropout = {key: 0.0 for key in settings if "dropout" in str(key)}
    torch.manual_seed(0)
    smaller = {key: value for key, value in SMALLER.items() if key in settings}
    model = MaskedLM(get_class(target)(**{**settings, **smaller, **dropout}))
    for parameter in model.parameters():  # at initialisation the layers hardly change the residual: make them matter
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return model


def documents(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(300, (length,), generator=generator) for length in lengths]


def run_causal(backbone, packed: list[torch.Tensor], positions: torch.Tensor | None = None) -> torch.Tensor:
    lengths = [len(document) for document in packed]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return backbone(torch.cat(packed), ends, max(lengths), positions, causal=True)


def run(model: MaskedLM, packed: list[torch.Tensor]) -> torch.Tensor:
    lengths = [len(document) for document in packed]
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    return model.logits(torch.cat(packed), ends, max(lengths), torch.arange(sum(lengths)))


def test_it_is_a_backbone(objective):
    backbone = objective.backbone
    assert isinstance(backbone, Backbone)
    hidden = backbone(torch.cat(documents([3, 5])), torch.tensor([0, 3, 8], dtype=torch.int32), 5)
    assert hidden.shape == (8, backbone.hidden_size)
    assert backbone.token_embeddings().weight.shape == (backbone.vocab_size, backbone.hidden_size)
    owned = {id(parameter) for parameter in objective.parameters()}
    matrices = backbone.describe().linear_weights()
    assert matrices
    assert all(matrix.ndim == 2 and id(matrix) in owned for matrix in matrices)
    assert id(backbone.token_embeddings().weight) not in {id(matrix) for matrix in matrices}
    assert all(hasattr(backbone, name) for name in backbone.PHASE_ATTRIBUTES)


def test_packed_equals_documents_alone_forward_and_backward(objective):
    objective.double()  # some gradients are what is left of large numbers: let only leaks differ, not rounding
    packed = run(objective, documents())
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(2)) / len(packed)
    (packed * weight).sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in objective.named_parameters()}
    objective.zero_grad()
    start = 0
    for document in documents():
        alone = run(objective, [document])
        end = start + len(document)
        assert relative(packed[start:end], alone) <= 1e-9
        (alone * weight[start:end]).sum().backward()
        start = end
    for name, parameter in objective.named_parameters():
        assert relative(together[name], parameter.grad) <= 1e-9, name


def test_some_positions_are_those_of_all_forward_and_backward(objective):
    """The last layer is computed for these positions alone."""
    objective.double()
    packed = documents([1, 3, 64, 70, 600])
    ends = torch.tensor([0, *(len(document) for document in packed)]).cumsum(0).int()
    positions = torch.tensor([0, 2, 3, 60, 61, 136, 137, 500, int(ends[-1]) - 1])
    weight = torch.randn(len(positions), objective.backbone.hidden_size, generator=torch.Generator().manual_seed(2)).double()
    results = []
    for some in (False, True):
        objective.zero_grad()
        hidden = objective.backbone(torch.cat(packed), ends, 600, positions if some else None)
        hidden = hidden if some else hidden[positions]
        (hidden * weight).sum().backward()
        results.append([hidden, *(parameter.grad.clone() for parameter in objective.backbone.parameters())])
    for of_all, of_some in zip(*results, strict=True):
        assert relative(of_all, of_some) <= 1e-9


def test_a_causal_token_sees_all_before_it_and_none_after_it(causal_backbone):
    """By what is computed: a document cut short gives the same at what is left of it."""
    whole = documents([700, 130])
    states = run_causal(causal_backbone, whole)
    for length in (1, 2, 64, 65, 300, 699):
        assert relative(run_causal(causal_backbone, [whole[0][:length]]), states[:length]) <= 1e-9
        assert relative(run_causal(causal_backbone, [whole[0][1 : length + 1]])[-1], states[length]) > 1e-6  # cls has gone


def test_a_causal_token_has_no_gradient_from_its_right(causal_backbone):
    document = documents([300])
    at = 140
    states = run_causal(causal_backbone, document, torch.tensor([at]))
    states.sum().backward()
    gradient = causal_backbone.token_embeddings().weight.grad.abs().sum(1)
    before, after = ({*part.tolist()} for part in (document[0][: at + 1], document[0][at + 1 :]))
    assert all(gradient[token] == 0 for token in after - before)
    assert gradient[document[0][at]] > 0


def test_causal_packed_equals_alone_at_all_and_at_some_positions(causal_backbone):
    states = run_causal(causal_backbone, documents())
    alone = torch.cat([run_causal(causal_backbone, [document]) for document in documents()])
    assert relative(states, alone) <= 1e-9
    some = torch.tensor([0, 1, 5, 80, 81, 700, len(states) - 1])
    assert relative(run_causal(causal_backbone, documents(), some), states[some]) <= 1e-9


def test_what_shares_a_row_with_a_document_does_not_matter(objective):
    first, second, third = documents([40, 90, 25])
    one = run(objective, [first, second])[:40]
    other = run(objective, [first, third.flip(0)])[:40]
    assert relative(one, other) <= 1e-5


def test_every_parameter_gets_a_gradient(objective):
    run(objective, documents([300, 200])).square().mean().backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_it_is_deterministic_and_survives_saving(objective, tmp_path):
    before = run(objective, documents([10, 50]))
    assert torch.equal(before, run(objective, documents([10, 50])))
    torch.save(objective.state_dict(), tmp_path / "weights")
    for parameter in objective.parameters():
        parameter.data.zero_()
    objective.load_state_dict(torch.load(tmp_path / "weights", weights_only=True))
    assert torch.equal(before, run(objective, documents([10, 50])))


def test_a_document_that_is_too_long_is_refused(objective):
    longest = objective.backbone.max_position
    with pytest.raises(ValueError, match=f"{longest + 1} tokens exceeds backbone.max_position={longest}"):
        run(objective, documents([longest + 1]))


def test_what_a_phase_sets_changes_the_model(objective):
    for name in objective.backbone.PHASE_ATTRIBUTES:
        before = run(objective, documents([200]))
        setattr(objective.backbone, name, 2 * getattr(objective.backbone, name))
        assert relative(run(objective, documents([200])), before) > 1e-4


def test_a_residual_stream_in_bf16_changes_hidden_states_by_its_rounding_only():
    packed, states = documents([300, 200]), []
    for in_fp32 in (True, False):
        torch.manual_seed(0)
        model = MaskedLM(ModernBERT(300, 64, 96, 6, 4, 512, 1e4, 1e4, residual_in_fp32=in_fp32))
        streams: list[torch.Tensor] = []
        for layer in model.backbone.describe().layers:
            layer.register_forward_hook(lambda layer, inputs, out, streams=streams: streams.append(out))
        with torch.autocast("cpu", torch.bfloat16):
            states.append(run(model, packed).float())
        assert {stream.dtype for stream in streams} == {torch.float32 if in_fp32 else torch.bfloat16}
    assert 0 < relative(states[0], states[1]) < 0.02
