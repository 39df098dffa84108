"""Fine-tuning: tasks of every kind are learnt, kept models give the scores that were found, and settings are followed."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from seqeval.metrics import f1_score

from modernenc.evaluation import cells
from modernenc.evaluation.cells import Request
from modernenc.evaluation.kept import save_best
from modernenc.evaluation.models import Model, find_models, random_twin
from modernenc.evaluation.settings import FineTuning, read_fine_tuning
from modernenc.suites import fine_tuning
from modernenc.suites.tasks import read_task
from support.encoders import LEARN, write_encoder, write_tasks
from support.runs import train


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Model:
    (model,) = find_models([str(write_encoder(tmp_path_factory.mktemp("encoder")))], tmp_path_factory.mktemp("none"))
    return replace(model, name="small")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def _results(out, made):
    (out / cells.CELLS).mkdir(parents=True, exist_ok=True)
    done: list[str] = []
    cells.run(made, out, lambda result, left: done.append(result.task))
    return {cell.task: _read(cell, out) for cell in made}, done


def _read(cell, out) -> cells.Measurement:
    result = cells.read(cell, out)
    assert result
    return result


def test_every_kind_of_task_is_learnt_and_kept(encoder, tasks, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

    made, notes = fine_tuning.make_cells(Request("classify", [encoder], tasks, (), "cramming", LEARN, keep=True))
    results, _ = _results(tmp_path, made)
    assert not notes
    assert results["fox"].scores["accuracy"] > 0.95
    assert results["foxes"].scores["pearson"] > 0.9
    assert results["ending"].scores["accuracy"] > 0.95
    assert results["tags"].scores["entity_f1"] > 0.95
    saved = save_best(made, tmp_path, tmp_path / "saved")
    assert sorted(saved) == [tmp_path / "saved" / "small" / name for name in ("ending", "fox", "foxes", "tags")]

    folder, dev = tmp_path / "saved" / "small" / "fox", read_task(tasks / "fox").dev
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        best = model(**tokenizer([item.texts[0] for item in dev], padding=True, return_tensors="pt")).logits.argmax(-1).tolist()
    assert best == results["fox"].found.predictions["predictions"]
    right = [model.config.id2label[number] == item.label for number, item in zip(best, dev, strict=True)]
    assert np.mean(right) == results["fox"].scores["accuracy"]

    folder, dev = tmp_path / "saved" / "small" / "tags", read_task(tasks / "tags").dev
    model = AutoModelForTokenClassification.from_pretrained(folder)
    with torch.no_grad():
        rows = [model(**tokenizer(" ".join(item.texts), return_tensors="pt")).logits[0, 1:-1].argmax(-1) for item in dev]
    predicted = [[model.config.id2label[number] for number in row.tolist()] for row in rows]
    assert f1_score([list(item.label) for item in dev], predicted) == pytest.approx(results["tags"].scores["entity_f1"])


def test_a_task_begins_with_the_model_of_another(encoder, tasks, tmp_path):
    changes = [*LEARN, "start_from.only=fox"]
    folder = tmp_path / "tasks"
    for name in ("fox", "only"):
        (folder / name).mkdir(parents=True)
        (folder / name / "dev.tsv").write_text((tasks / "fox" / "dev.tsv").read_text())
    (folder / "fox" / "train.tsv").write_text((tasks / "fox" / "train.tsv").read_text())
    made, _ = fine_tuning.make_cells(Request("glue", [encoder], folder, (), "cramming", changes, seeds=2))
    results, done = _results(
        tmp_path, [cell for cell in made if cell.task == "only"] + [cell for cell in made if cell.task == "fox"]
    )
    assert done == ["fox", "fox", "only", "only"]  # whatever the order in which they are asked for
    assert results["only"].found.predictions == results["fox"].found.predictions  # the same head scores the same items
    (folder / "only" / "train.tsv").write_text("label\tsentence\nno\tfox\nyes\tdog\n" * 50)
    trained, _ = fine_tuning.make_cells(Request("glue", [encoder], folder, (), "cramming", changes))
    again, _ = _results(tmp_path, trained)
    assert again["only"].scores["accuracy"] < 0.5 < again["fox"].scores["accuracy"]  # it has learnt the contrary
    made, notes = fine_tuning.make_cells(Request("glue", [encoder], folder, ["only"], "cramming", changes))
    assert notes == ["only begins with the encoder itself: fox is not among the tasks"] and not made[0].after
    (folder / "only" / "train.tsv").unlink()
    made, notes = fine_tuning.make_cells(Request("glue", [encoder], folder, ["only"], "cramming", LEARN))
    assert not made and notes[0].startswith("only has no train* file: left out")


def test_a_cell_is_done_once_and_is_another_for_other_settings_data_or_weights(encoder, tasks, tmp_path):
    def made(*changes: str, model: Model = encoder, data=tasks, seeds: int = 1):
        request = Request("classify", [model], data, ("fox",), "cramming", [*LEARN, "epochs=1", *changes], seeds)
        return fine_tuning.make_cells(request)[0]

    first, done = _results(tmp_path, made())
    assert done == ["fox"]
    again, done = _results(tmp_path, made())
    assert not done and again == first
    moved = replace(encoder, name="moved")
    assert not _results(tmp_path, made(model=moved))[1]
    assert _read(made(model=moved)[0], tmp_path).model == "moved"
    assert [cell.seed for cell in made(seeds=3)] == [0, 1, 2]
    others = [made("lr=1e-3"), made("batch_size=8"), made(model=random_twin(encoder, tmp_path)), made(seeds=2)[1:]]
    other = write_tasks(tmp_path / "other", count=20)
    assert len({cells[0].name for cells in [made(), *others, made(data=other)]}) == 6


def test_the_best_epoch_counts_where_training_stops_early(encoder, tasks, tmp_path):
    changes = [*LEARN, "epochs=6", "patience=2", "lr=2e-2"]
    made, _ = fine_tuning.make_cells(Request("classify", [encoder], tasks, ("fox",), "cramming", changes, keep=True))
    results, _ = _results(tmp_path, made)
    history = results["fox"].found.curves["score by epoch"].y
    assert results["fox"].scores["accuracy"] == max(history)
    assert len(history) <= history.index(max(history)) + 3
    (saved,) = save_best(made, tmp_path, tmp_path / "saved")
    alone, _ = fine_tuning.make_cells(
        Request(
            "classify",
            find_models([f"kept={saved}"], tmp_path),
            _dev_only(tasks, tmp_path),
            (),
            "cramming",
            [*LEARN, "start_from.fox=x"],
        )
    )
    assert not alone  # it has no items to train on, and no task to begin with


def _dev_only(tasks, folder):
    (folder / "dev_only" / "fox").mkdir(parents=True)
    (folder / "dev_only" / "fox" / "dev.tsv").write_text((tasks / "fox" / "dev.tsv").read_text())
    return folder / "dev_only"


def test_long_texts_are_cut_and_counted(encoder, tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    rows = "".join(f"{number % 2}\t{'fox ' * (100 if number < 5 else 3)}\n" for number in range(20))
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("label\tsentence\n" + rows)
    made, _ = fine_tuning.make_cells(
        Request("classify", [encoder], folder, (), "cramming", [*LEARN, "epochs=1", "max_length=999"])
    )
    results, _ = _results(tmp_path, made)
    assert results["long"].found.notes == ("25.0% of the texts are cut at 64 tokens",)  # the model reads no more


def test_settings_are_a_grid_for_each_task():
    settings = read_fine_tuning("modernbert_search", ["lr=[1e-5,2e-5]", "tasks.CoLA.epochs=1", "tasks.CoLA.batch_size=8"])
    assert len(settings.of_task("MRPC")) == 2 * 4 * 3
    cola = settings.of_task("cola")
    assert len(cola) == 2 * 4 and {one.batch_size for one in cola} == {8} and {one.epochs for one in cola} == {1}
    assert settings.source_of("stsb") == "MNLI" and not settings.source_of("CoLA")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("absent", [], "--settings absent: no such file; the shipped settings are cramming, "),
        ("cramming", ["learning_rate=1"], "learning_rate"),
        ("cramming", ["lr=fast"], "fast"),
        ("cramming", ["lr=-1"], r"tasks.CoLA: lr=-1|lr=-1.0: expected more than 0"),
        ("cramming", ["tasks.CoLA.rate=1"], "tasks.CoLA.rate: unknown key; there are batch_size"),
        ("cramming", ["tasks.CoLA=3"], "tasks.CoLA=3: expected keys of a setting"),
        ("cramming", ["tasks.CoLA.lr=[]"], "tasks.CoLA.lr is empty"),
        ("cramming", ["schedule=step", "tasks.CoLA.lr=1e-5"], "tasks.CoLA.schedule=step: expected one of linear, cosine"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_one_clear_line(name, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        settings = read_fine_tuning(name, changes)
        settings.of_task("CoLA")


def test_shipped_settings_are_valid():
    from modernenc.evaluation.settings import FOLDER

    for path in FOLDER.glob("*.yaml"):
        if "weight_decay:" in path.read_text():
            assert isinstance(read_fine_tuning(path.stem, []), FineTuning)


def test_models_are_named_and_mistaken_ones_are_one_clear_line(encoder, tmp_path):
    folder = encoder.folder
    one, same = find_models([f"a={folder}", f"b={folder}"], tmp_path)[0], find_models([str(folder)], tmp_path)[0]
    assert (one.name, same.name) == ("a", folder.name) and one.fingerprint == same.fingerprint
    other = write_encoder(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="another model is called a too; name it: NAME="):
        find_models([f"a={folder}", f"a={other}"], tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a run folder, a checkpoint, nor a Hugging Face folder"):
        find_models([str(tmp_path / "empty")], tmp_path)
    (other / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no weights"):
        find_models([str(other)], tmp_path)
    twin = random_twin(encoder, tmp_path)
    assert twin.name == f"{encoder.name} (random)" and twin.fingerprint != encoder.fingerprint
    assert json.loads((twin.folder / "config.json").read_text())["hidden_size"] == 32


def test_a_checkpoint_of_mega_is_fine_tuned_and_its_twin_too(small_run, tasks, tmp_path):
    run_dir = train(
        small_run("phases.stable.tokens=3000", "phases.extend.tokens=1000", "phases.decay.tokens=1000", recipe="demo_mega")
    )
    (model,) = find_models([f"mega={run_dir}"], tmp_path)
    changes = [*LEARN, "epochs=1"]
    request = Request(
        "classify", [model, random_twin(model, tmp_path)], tasks, ("fox", "ending"), "cramming", changes, keep=True
    )
    made, _ = fine_tuning.make_cells(request)
    (tmp_path / cells.CELLS).mkdir()
    cells.run(made, tmp_path, lambda result, left: None)
    scores = {(cell.task, cell.model.name): _read(cell, tmp_path).scores["accuracy"] for cell in made}
    assert min(scores["ending", "mega"], scores["ending", "mega (random)"]) > 0.7
    assert all((folder / "modeling_mega.py").is_file() for folder in save_best(made, tmp_path, tmp_path / "saved"))


def test_weights_are_trained_in_single_precision_whatever_they_were_saved_as(encoder, tasks, tmp_path):
    from transformers import AutoModelForMaskedLM

    from modernenc.suites.predictor import Predictor
    from modernenc.suites.trainer import _with_head

    half = tmp_path / "half"
    AutoModelForMaskedLM.from_pretrained(encoder.folder).bfloat16().save_pretrained(half)
    setting = read_fine_tuning("cramming", LEARN).of_task("fox")[0]
    (half / "tokenizer.json").write_bytes((encoder.folder / "tokenizer.json").read_bytes())
    (half / "tokenizer_config.json").write_bytes((encoder.folder / "tokenizer_config.json").read_bytes())
    trained = _with_head(half, read_task(tasks / "fox"), setting)
    assert {weight.dtype for weight in [*trained.parameters(), *Predictor(half, 512, "fp32").model.parameters()]} == {
        torch.float32
    }


def test_batches_of_training_mix_texts_of_all_lengths(encoder, tasks, tmp_path):
    """Where the length of a text says something about its label, batches of like lengths teach worse."""
    from modernenc.suites.trainer import _arguments, _Trainer, _with_head

    setting = read_fine_tuning("cramming", LEARN).of_task("fox")[0]
    model = _with_head(encoder.folder, read_task(tasks / "fox"), setting)
    items = [{"input_ids": [1] * length, "labels": 0} for length in [4] * 100 + [40] * 100]
    trainer = _Trainer(
        model,
        _arguments(setting, 0, str(tmp_path), len(items)),
        data_collator=lambda rows: {"lengths": torch.tensor([len(row["input_ids"]) for row in rows])},
        train_dataset=items,  # pyright: ignore[reportArgumentType]
    )
    batches = [set(batch["lengths"].tolist()) for batch in trainer.get_train_dataloader()]
    assert len(batches) == 13 and batches[:12] == [{4, 40}] * 12


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["fox", "foxes", "ending", "tags"])
def test_the_parts_of_a_batch_have_its_loss_and_gradients_and_less_padding(encoder, tasks, tmp_path, monkeypatch, name, side):
    from transformers import AutoTokenizer

    from modernenc.suites import trainer as suite
    from modernenc.suites.trainer import COLLATORS, _arguments, _encode, _Trainer, _with_head, parts_of_like_lengths

    monkeypatch.setattr(suite, "MULTIPLE", 2)
    task, setting = read_task(tasks / name), read_fine_tuning("cramming", LEARN).of_task(name)[0]
    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    tokenizer.padding_side = side
    model = _with_head(encoder.folder, task, setting).eval()
    items = _encode(task.train[:20], task.kind, task.labels or ("0", "1", "2", "3"), tokenizer, 512)[0]
    batch = COLLATORS[task.kind](tokenizer, pad_to_multiple_of=2)(items)
    trainer = _Trainer(model, _arguments(replace(setting, precision="fp32"), 0, str(tmp_path), 20))
    losses, gradients = [], []
    for loss in (trainer.compute_loss(model, batch), model(**batch).loss):
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    parts = parts_of_like_lengths(batch)
    assert sum(len(part["labels"]) for part in parts) == 20
    assert sum(part["input_ids"].numel() for part in parts) < batch["input_ids"].numel()


def test_words_without_tokens_move_no_tag(encoder):
    from transformers import AutoTokenizer

    from modernenc.suites.examples import Example
    from modernenc.suites.trainer import _encode_words, _predictions

    tokenizer = AutoTokenizer.from_pretrained(encoder.folder)
    item, labels = Example(("the", "\u2003", "fox", "dog"), ("O", "O", "B-A", "O")), ("B-A", "O")  # a space is no word to it
    coded, words, _ = _encode_words(item, labels, tokenizer, 32)
    assert words == [0, 2, 3]
    targets = np.array([coded["labels"]])
    logits = np.eye(2)[np.where(targets < 0, 0, targets)]
    task = replace(read_task_of(item), dev=[item], labels=labels)
    assert _predictions(logits, targets, task, labels, [0], [words]) == {"counts": [[1, 1, 1]]}


def read_task_of(item):
    from modernenc.suites.examples import TAGS
    from modernenc.suites.tasks import LabelledTask

    return LabelledTask("tags", TAGS, [], [item], (), ("entity_f1",), "")


def test_names_with_marks_are_shown_as_they_are(encoder, tasks, tmp_path, capsys):
    from modernenc.reporting import scores, scores_page

    models = [replace(encoder, name="base[b] $x^$ [/b]")]
    made, _ = fine_tuning.make_cells(Request("classify", models, tasks, ("fox",), "cramming", [*LEARN, "epochs=1"]))
    results, _ = _results(tmp_path, made)
    scores.show("classify", list(results.values()))
    scores_page.write(tmp_path / "page.html", "classify", list(results.values()))
    assert "base[b] $x^$ [/b]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes, message",
    [
        (["start_from.a=b", "start_from.b=a"], "leads back to"),
        (["tasks.c.lr=1"], "tasks.c.lr=1: there is no such task; there are a, b, unlabelled"),
        (["start_from.unlabelled=a"], "the tasks have different labels"),
    ],
)
def test_a_start_that_cannot_be_is_one_clear_line(encoder, tmp_path, changes, message):
    for name in ("a", "b", "unlabelled"):
        (tmp_path / name).mkdir()
        labels = ("yes", "no") if name != "unlabelled" else ("1", "0")
        for split in ("train", "dev") if name != "unlabelled" else ("dev",):
            (tmp_path / name / f"{split}.tsv").write_text("label\tsentence\n" + "".join(f"{label}\tfox\n" for label in labels))
    with pytest.raises(ValueError, match=message):
        fine_tuning.make_cells(Request("classify", [encoder], tmp_path, (), "cramming", changes))


def test_a_model_that_needs_code_of_its_own_is_refused_and_a_damaged_cell_named(encoder, tasks, tmp_path):
    folder = write_encoder(tmp_path / "remote")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}))
    with pytest.raises(ValueError, match="transformers has no model_type evil; code in a folder is not run"):
        find_models([str(folder)], tmp_path)
    made, _ = fine_tuning.make_cells(Request("classify", [encoder], tasks, ("fox",), "cramming", [*LEARN, "epochs=1"]))
    (tmp_path / cells.CELLS).mkdir()
    (tmp_path / cells.CELLS / f"{made[0].name}.json").write_text("{")
    with pytest.raises(ValueError, match=rf"{made[0].name}.json is damaged: .*; delete it"):
        cells.read(made[0], tmp_path)


def test_damaged_weights_and_a_missing_tokenizer_are_one_clear_line(tmp_path):
    folder = write_encoder(tmp_path / "encoder")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: .*; save the model again"):
        find_models([str(folder)], tmp_path)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer \(tokenizer\.json"):
        find_models([str(folder)], tmp_path)


def test_the_f1_of_an_official_task_needs_its_labels(tmp_path):
    (tmp_path / "MRPC").mkdir()
    for split in ("train", "dev"):
        (tmp_path / "MRPC" / f"{split}.tsv").write_text("label\tsentence1\tsentence2\nequivalent\ta\tb\nnot_equivalent\ta\tb\n")
    with pytest.raises(ValueError, match="expected the labels 0 and 1, not equivalent, not_equivalent"):
        read_task(tmp_path / "MRPC")
