"""Batches are padded to few shapes, and the padding changes nothing."""

from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf

from modernenc.config import CONF_DIR
from modernenc.data.batch import MULTIPLE, MicroBatch
from modernenc.objectives import Objectives
from modernenc.objectives.masked_lm import MaskedLM


def batch(lengths: list[int], targets: int, objective: str = "masked_lm") -> MicroBatch:
    generator = torch.Generator().manual_seed(sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    places = ends[:-1].long() if objective != "masked_lm" else torch.randperm(sum(lengths), generator=generator)[:targets]
    answers = torch.randint(4, (targets,), generator=generator)
    ids = torch.randint(90, (sum(lengths),), generator=generator)
    return MicroBatch.of(ids.numpy(), ends.numpy(), places.numpy(), answers.numpy(), 0, objective)


@pytest.mark.parametrize("lengths", [[1], [64], [63, 2], [40, 17, 100, 3], [128, 64]])
def test_numbers_of_tokens_and_positions_are_multiples(lengths):
    even = batch(lengths, min(sum(lengths), 7))
    plain = even.unpadded()
    assert plain.num_tokens == len(plain.input_ids) == sum(lengths) and plain.max_seqlen == max(lengths)
    assert len(plain.target_positions) == len(plain.targets)
    assert len(even.input_ids) % MULTIPLE == 0 and len(even.target_positions) % MULTIPLE == 0
    assert len(even.input_ids) - sum(lengths) < MULTIPLE
    assert even.cu_seqlens[: len(lengths) + 1].equal(plain.cu_seqlens) and int(even.cu_seqlens[-1]) == len(even.input_ids)
    assert even.max_seqlen >= int(even.cu_seqlens.diff().max())
    assert even.input_ids[: sum(lengths)].equal(plain.input_ids) and even.targets.equal(plain.targets)


@pytest.mark.parametrize("backbone", ["modernbert_tiny", "mega_tiny"])
@pytest.mark.parametrize("objective", ["masked_lm", "choose"])
def test_loss_right_answers_and_gradients_are_those_of_the_batch_as_it_is(backbone, objective):
    settings: Any = OmegaConf.to_container(OmegaConf.load(CONF_DIR / "backbone" / f"{backbone}.yaml"))
    smaller = {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 96, "max_position": 256}
    without = {key: 0.0 for key in settings if "dropout" in key}
    heads = {"num_attention_heads": 2} if "num_attention_heads" in settings else {}
    torch.manual_seed(5)
    model = get_class(settings.pop("_target_"))(**{**settings, **smaller, **without, **heads})
    objectives = Objectives(MaskedLM(model), ["choose"]).double()
    given = batch([50, 3, 90, 1, 20, 64, 7, 12], 2 if objective == "choose" else 31, objective)

    def results(given: MicroBatch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        objectives.zero_grad()
        loss, right = objectives(given)
        loss.backward()
        grads = {name: weight.grad.clone() for name, weight in objectives.named_parameters() if weight.grad is not None}
        return loss.detach(), right, grads

    loss, right, grads = results(given)
    plain_loss, plain_right, plain_grads = results(given.unpadded())
    assert torch.allclose(loss, plain_loss, rtol=1e-10) and right == plain_right
    assert grads.keys() == plain_grads.keys()
    for name, grad in grads.items():
        assert torch.allclose(grad, plain_grads[name], rtol=1e-8, atol=1e-10), name
