"""What a run takes from its source besides weights: its shape, its losses before the first step, the ids of its tokens."""

import json

import pytest

from modernenc.data.blocks import Corpus
from modernenc.model.export import export
from modernenc.planning.model_checks import check_init
from modernenc.run_folder.tables import Table
from support.results import FINAL
from support.runs import SMALL, composed, train


def at_reference(rows: list[dict[str, str]], step: str) -> dict[str, str]:
    """Return the losses of a step by source, in rows of 64 and at 15 %."""
    return {
        row["source"]: row["loss"] for row in rows if (row["step"], row["seq_len"], row["mask_ratio"]) == (step, "64", "0.15")
    }


@pytest.mark.parametrize("recipe", ["demo", "demo_mega"])
def test_a_run_takes_its_shape_from_its_source_and_validates_it_first(recipe, small_run, tmp_path):
    folder = train(small_run(f"run_dir={tmp_path / 'source'}", recipe=recipe))
    export([folder], tmp_path / "exported")
    given = small_run(recipe=recipe).backbone
    shape, added = ["backbone=of_source"], {}
    if recipe == "demo":
        given = {**given, "global_rope_theta": 160_000}  # as the last phase left it
        shape, added = [*shape, "+backbone.max_position=512"], {"max_position": 512}
    rest = [setting for setting in SMALL if not setting.startswith("backbone.")]
    rest += ["init.unigram=false", "~phases.extend.backbone.global_rope_theta", f"data.root={small_run().data.root}"]
    for place in (folder / FINAL, tmp_path / "exported"):
        run_dir = f"run_dir={tmp_path / f'from-{place.name}'}"
        run = composed(["+recipe=demo", *rest, *shape, f"init.source={place}", run_dir])
        assert run.backbone == {key: {**given, **added}[key] for key in run.backbone} and len(run.backbone) >= 10
        scores = Table(train(run) / "validation.csv").read()
        assert at_reference(scores, "0") == at_reference(Table(folder / "validation.csv").read(), "38"), "as its source ended"


def test_a_shape_needs_a_source(small_run, tmp_path):
    with pytest.raises(ValueError, match=r"backbone: its shape is that of init\.source, which is not set"):
        composed(["+recipe=demo", "backbone=of_source", "data.root=nowhere"])
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ValueError, match=r"is of model_type t5; expected .*modernbert"):
        composed(["+recipe=demo", "backbone=of_source", "data.root=nowhere", f"init.source={tmp_path}"])


def test_another_tokenizer_of_the_same_size_is_refused(corpus_root, small_run, tmp_path):
    folder = train(small_run(f"run_dir={tmp_path / 'source'}"))
    export([folder], tmp_path / "exported")
    for place in (tmp_path / "exported", folder / "corpus"):
        tokenizer = json.loads((place / "tokenizer.json").read_text())
        names = {number: token for token, number in tokenizer["model"]["vocab"].items()}
        tokenizer["model"]["vocab"] |= {names[300]: 301, names[301]: 300}
        (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    for source in (tmp_path / "exported", folder / FINAL):
        run = small_run(f"init.source={source}")
        with pytest.raises(ValueError, match=r"has another tokenizer than .*: 2 of 512 tokens have other ids, such as"):
            check_init(run, Corpus.of(run.data))
        carried = small_run(f"init.source={source}", f"init.tokenizer={corpus_root / 'tokenizer.json'}")
        check_init(carried, Corpus.of(carried.data))


def test_a_plan_says_whether_its_source_has_decayed(small_run, tmp_path):
    folder = train(small_run(f"run_dir={tmp_path / 'source'}"))
    export([folder], tmp_path / "exported")
    for place, said in (
        (
            folder / "checkpoints" / "end-of-stable.ckpt",
            "goes on with both; here the optimizer is new, and the learning rate rises again, to optim.lr=0.01",
        ),
        (folder / FINAL, "of its peak learning rate: the learning rate rises again, to optim.lr=0.01"),
        (tmp_path / "exported", "does not say its learning rate, and is taken for decayed: the learning rate rises again"),
    ):
        run = small_run(f"init.source={place}", "backbone.global_rope_theta=160_000", "optim.lr=0.01")
        assert said in check_init(run, Corpus.of(run.data))[-1]
