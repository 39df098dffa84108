"""Read a checkpoint that the ModernBERT repository's own trainer wrote: a `.pt` file of MosaicML Composer, with a FlexBERT.

Its settings have other names than transformers', and some that ModernBERT leaves at one value are checked to have it. Where its
local layers have no rotary base of their own (-1), they have the global one.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIX = ".pt"
LONGEST = 8_192
"""Positions that a model from such a checkpoint has: its rotary embedding knows no limit."""
FIXED = {
    "attention_layer": "rope", "attn_out_bias": False, "attn_qkv_bias": False, "bert_layer": "prenorm", "decoder_bias": True,
    "embed_norm": True, "embedding_layer": "sans_pos", "final_norm": True, "head_pred_act": "gelu", "head_pred_bias": False,
    "head_pred_norm": True, "hidden_act": "gelu", "initial_attention_layer": None, "initial_bert_layer": None,
    "initial_mlp_layer": None, "local_attn_rotary_emb_dim": None, "mlp_in_bias": False, "mlp_layer": "glu",
    "mlp_out_bias": False, "normalization": "layernorm", "rotary_emb_interleaved": False, "rotary_emb_scale_base": None,
    "skip_first_prenorm": True,
}  # fmt: skip
"""FlexBERT's settings for which ModernBERT has only this value."""
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_WHERE = ("integrations", "huggingface", "model", "config", "content")
"""Where a checkpoint holds the settings of its model, within its state."""


def read_composer(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a checkpoint as the config.json and the weights, in fp32, that transformers' ModernBERT would have.

    Raises FileNotFoundError or ValueError, naming the file and the setting, for what is no such checkpoint, or no ModernBERT.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a checkpoint (*.ckpt, *{SUFFIX}) or a Hugging Face folder")
    try:
        content = torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read without running code in it ({str(error).partition(chr(10))[0]}). If you trust it, copy the "
            "weights out where Composer is installed: python -c \"import torch; s = torch.load('CHECKPOINT', 'cpu', "
            "weights_only=False)['state']; torch.save({'model': s['model'], 'config': "
            f"s{''.join(f'[{key!r}]' for key in _WHERE)}}}, 'weights.pt')\""
        ) from error
    state = content.get("state", content) if isinstance(content, dict) else {}
    weights, settings = state.get("model") or {}, state.get("config") or _at(state, _WHERE)
    first = next((name for name in weights if name.endswith("bert.embeddings.tok_embeddings.weight")), None)
    if first is None or not isinstance(settings, dict):
        raise ValueError(f"{path}: expected a checkpoint of the ModernBERT repository: weights of a FlexBERT, and its settings")
    prefix = first.removesuffix("bert.embeddings.tok_embeddings.weight")
    renamed = {_rename(name.removeprefix(prefix)): weight.float() for name, weight in weights.items()}
    return _config(settings, path), renamed


def _rename(name: str) -> str:
    return f"model.{name.removeprefix('bert.').removeprefix('encoder.')}" if name.startswith("bert.") else name


def _config(settings: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the settings of a FlexBERT under transformers 4's names."""
    for key, value in FIXED.items():
        if (found := settings.get(key, value)) != value:
            raise ValueError(f"{path}: {key}={found}; ModernBERT has {value}, so logits would be others")
    norm = settings.get("norm_kwargs", {})
    if norm.get("bias", False):
        raise ValueError(f"{path}: norm_kwargs.bias=True; ModernBERT has none, so logits would be others")
    for key in _SIZES:
        if key not in settings:
            raise ValueError(f"{path}: its settings have no {key}")
    base, local = settings.get("rotary_emb_base", 10_000.0), settings.get("local_attn_rotary_emb_base", -1)
    windowed = settings.get("sliding_window", -1) > 0
    every = settings.get("global_attn_every_n_layers", -1)
    if windowed and every < 1:
        raise ValueError(
            f"{path}: global_attn_every_n_layers={every} with a sliding_window: ModernBERT's first layer is global"
        )
    return {
        "model_type": "modernbert",
        **{key: settings[key] for key in _SIZES},
        "max_position_embeddings": LONGEST,
        "global_attn_every_n_layers": every if windowed else 1,
        "local_attention": settings["sliding_window"] if windowed else 128,
        "global_rope_theta": base,
        "local_rope_theta": local if local > 0 else base,
        "norm_eps": norm.get("eps", 1e-5),
    }


def _at(content: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content
