"""How the saved corpus was made: `python tests/training/saved_corpus/make.py OUT`. Its text is drawn from a grammar of our own.

What is saved stays as it is, so that runs on it can be compared over years; this tells where it came from.
"""

import json
import random
import sys
import tempfile
from pathlib import Path

WORDS = {
    "name": [
        "Ada",
        "Ben",
        "Cleo",
        "Dora",
        "Emil",
        "Finn",
        "Greta",
        "Hugo",
        "Ida",
        "Jonas",
        "Kaja",
        "Leo",
        "Mira",
        "Nils",
        "Ota",
        "Pia",
        "Rosa",
        "Sten",
        "Tilda",
        "Uwe",
    ],
    "place": [
        "market",
        "harbour",
        "mill",
        "forest",
        "tower",
        "bridge",
        "garden",
        "station",
        "island",
        "valley",
        "orchard",
        "quarry",
    ],
    "thing": [
        "lamp",
        "basket",
        "clock",
        "letter",
        "violin",
        "ladder",
        "kettle",
        "map",
        "coin",
        "mirror",
        "bell",
        "boat",
        "rope",
        "candle",
        "drum",
        "apple",
    ],
    "kind": ["old", "small", "heavy", "green", "broken", "bright", "quiet", "narrow", "golden", "plain"],
    "did": ["found", "sold", "carried", "painted", "lost", "mended", "borrowed", "hid", "counted", "dropped"],
    "went": ["walked", "ran", "rowed", "rode", "hurried", "wandered"],
    "when": ["in the morning", "at noon", "before the storm", "after supper", "on Monday", "late at night"],
    "number": ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
}
SENTENCES = [
    "{name} {went} to the {place} {when}.",
    "{name} {did} the {kind} {thing} near the {place}.",
    "There were {number} {thing}s in the {place}, and {name} {did} them all {when}.",
    '"Where is the {kind} {thing}?" asked {name}.',
    "The {thing} that {name} {did} was {kind}, but the {place} was {kind} too.",
    "{name} and {name} {went} from the {place} to the {place}.",
]


def story(rng: random.Random) -> str:
    """Some sentences about few people and things, so that there is something to learn."""
    chosen = {kind: rng.sample(words, 3) for kind, words in WORDS.items()}

    def sentence() -> str:
        parts = rng.choice(SENTENCES).split("{")
        return parts[0] + "".join(rng.choice(chosen[kind]) + rest for kind, _, rest in (p.partition("}") for p in parts[1:]))

    return " ".join(sentence() for _ in range(rng.randint(2, 40)))


def sums(rng: random.Random) -> str:
    """Lines of sums."""
    pairs = [(rng.randint(0, 60), rng.randint(0, 60)) for _ in range(rng.randint(2, 20))]
    return "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs)


def main() -> None:
    """Write the text and prepare it."""
    from data_prep.build import build
    from data_prep.config import CorpusConfig, SourceConfig, TokenizerConfig

    with tempfile.TemporaryDirectory() as folder:
        sources = {}
        for name, write, number in (("stories", story, 130), ("sums", sums, 260)):
            rng = random.Random(name)
            (Path(folder) / name).mkdir()
            lines = [json.dumps({"text": write(rng), "id": f"{name}-{at}"}) for at in range(number)]
            (Path(folder) / name / "text.jsonl").write_text("\n".join(lines) + "\n")
            reader = {"_target_": "datatrove.pipeline.readers.JsonlReader", "data_folder": str(Path(folder) / name)}
            sources[name] = SourceConfig(reader=reader, licence="Apache-2.0", url="https://github.com/modernenc/modernenc")
        build(
            CorpusConfig(
                name="saved", out=sys.argv[1], sources=sources, tokenizer=TokenizerConfig(vocab_size=400, train_mb=1),
                block_tokens=256, validation_error=0.02, validation_share=0.1, max_dropped=0.01, buckets=1, workers=1,
            )
        )  # fmt: skip


if __name__ == "__main__":
    main()
