"""Writes tests/fixtures/iou.json: 1,000 random pairs of scene graphs with their IoU by the definition of LAION-SG
(arXiv 2412.08580), computed here with Python's own sets and Counters. Needs nothing but Python.

    python scripts/make_iou_fixture.py
"""

import json
import pathlib
import random
from collections import Counter

LABELS = list("abcde")
PREDICATES = list("xyz")


def graph(rng):
    """Three lists, as a judge gives them; objects and predicates without a triple, repeated names and empty lists among
    them."""
    triples = [
        [rng.choice(LABELS), rng.choice(PREDICATES), rng.choice(LABELS)] for _ in range(rng.choice([0, 1, 1, 2, 3, 4]))
    ]
    objects = [label for s, _, o in triples for label in (s, o) if rng.random() < 0.8]
    objects += [rng.choice(LABELS) for _ in range(rng.choice([0, 0, 1, 2]))]
    predicates = [p for _, p, _ in triples if rng.random() < 0.8]
    predicates += [rng.choice(PREDICATES) for _ in range(rng.choice([0, 0, 1]))]
    return {"triples": triples, "objects": objects, "predicates": predicates}


def set_iou(a, b):
    union = set(a) | set(b)
    return len(set(a) & set(b)) / len(union) if union else 0.0


def bag_iou(a, b):
    union = Counter(a) | Counter(b)
    return (Counter(a) & Counter(b)).total() / union.total() if union else 0.0


def scores(a, b, iou, derived=False):
    def parts(g):
        triples = [tuple(t) for t in g["triples"]]
        if not derived:
            return triples, g["objects"], g["predicates"]
        return triples, [x for s, _, o in triples for x in (s, o)], [p for _, p, _ in triples]

    return [iou(x, y) for x, y in zip(parts(a), parts(b))]


def main():
    rng = random.Random(0)
    pairs = []
    for _ in range(1000):
        a = graph(rng)
        # Half of the pairs are near each other: the same graph with some parts gone.
        b = graph(rng) if rng.random() < 0.5 else {k: [x for x in v if rng.random() < 0.7] for k, v in a.items()}
        pairs.append(
            {
                "a": a,
                "b": b,
                "strict": scores(a, b, set_iou),
                "derived": scores(a, b, set_iou, derived=True),
                "multiset": scores(a, b, bag_iou),
            }
        )
    path = pathlib.Path(__file__).parent.parent / "tests/fixtures/iou.json"
    path.write_text("[\n" + ",\n".join(json.dumps(p, separators=(",", ":")) for p in pairs) + "\n]\n")


if __name__ == "__main__":
    main()
