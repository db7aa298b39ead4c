"""The metrics of drawn pictures by name: what each needs, and the results it makes of what was seen."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ldm.errors import DataError, LdmError
from ldm.evaluation.distances import SUBSETS, frechet_distance, kernel_distance
from ldm.evaluation.figures import HALVES, Array, Share, of_mean, of_median, of_share
from ldm.evaluation.neighbours import COPIED, NEIGHBOURS, NEXT, copies, prdc
from ldm.evaluation.pictures import Look, pixels
from ldm.evaluation.results import Result, digest
from ldm.evaluation.retrieval import Styles, clip_scores, concept_and_style, recall_at_1, share_of
from ldm.evaluation.towers import Evaluator, Extractor

CLOSEST = 8  # pictures most like a training picture that are named


@dataclass(frozen=True)
class Judges:
    """What looks at pictures; `others` are captions to tell theirs from, `styles` words that are judged apart."""

    extractor: Extractor | None = None
    evaluator: Evaluator | None = None
    others: tuple[str, ...] = ()
    styles: Styles | None = None

    def eyes(self, names: Sequence[str], trained: bool = False) -> list[Extractor]:
        """The extractors that these metrics see pictures with; of training pictures, fewer are enough."""
        found = [pixels()] if "memorisation" in names else []
        found += [self.extractor] if self.extractor is not None else []
        return found + ([self.evaluator.extractor] if self.evaluator is not None and not trained else [])


@dataclass(frozen=True)
class Evidence:
    """All that the metrics of drawn pictures know. `made` is what decided the pictures, as JSON values."""

    drawn: Look
    made: Mapping[str, object]
    judges: Judges
    real: Look | None = None
    trained: Look | None = None

    @property
    def looks(self) -> list[tuple[str, Look, Mapping[str, object]]]:
        """The drawn pictures, the real ones beside them where there are some, and what decided each."""
        found: list[tuple[str, Look, Mapping[str, object]]] = [("drawn", self.drawn, self.made)]
        if self.real is not None:
            found.append(("real", self.real, {"pictures_sha256": self.real.sha256}))
        return found


def fid(e: Evidence) -> list[Result]:
    """Fréchet's distance of drawn and real pictures in the extractor's features."""
    assert e.judges.extractor is not None and e.real is not None
    drawn, real = _features(e, e.judges.extractor)
    size, width = min(len(drawn), len(real)), drawn.shape[1]
    notes = ["compare only with figures of as many pictures: with fewer it is higher"]
    if size <= width:
        notes.insert(
            0, f"{size:,} pictures for {width:,} features: too few, this is far too high; use more than {width:,}"
        )
    name = f"FID({e.judges.extractor.name}, {width} features)"
    decided = _against_real(e, "fid/1", halves=HALVES)
    return [Result(name, "drawn against real", frechet_distance(drawn, real), decided, notes=tuple(notes))]


def kid(e: Evidence) -> list[Result]:
    """The kernel distance of drawn and real pictures in the extractor's features."""
    assert e.judges.extractor is not None and e.real is not None
    drawn, real = _features(e, e.judges.extractor)
    found = kernel_distance(drawn, real)
    name = f"KID({e.judges.extractor.name}, {drawn.shape[1]} features)"
    details = {"deviation_over_subsets": found.deviation, "subsets": SUBSETS, "subset_size": found.size}
    decided = _against_real(e, "kid/1", subsets=SUBSETS, size=found.size)
    return [Result(name, "drawn against real", found.figure, decided, details=details)]


def neighbourhood(e: Evidence) -> list[Result]:
    """Precision, recall, density and coverage in the extractor's features."""
    assert e.judges.extractor is not None and e.real is not None
    drawn, real = _features(e, e.judges.extractor)
    found, decided = prdc(drawn, real), _against_real(e, "prdc/1", k=NEIGHBOURS)
    return [
        Result(f"{name}({e.judges.extractor.name})", "drawn against real", getattr(found, name), decided, unit)
        for name, unit in (("precision", "%"), ("recall", "%"), ("density", ""), ("coverage", "%"))
    ]


def clip_score(e: Evidence) -> list[Result]:
    """How near pictures are to their captions."""
    assert e.judges.evaluator is not None
    results = []
    for of, seen, made in e.looks:
        scores = clip_scores(seen.features[e.judges.evaluator.sha256], e.judges.evaluator.texts(_captions(seen)))
        decided = {"version": "clip-score/1", "evaluator_sha256": e.judges.evaluator.sha256, "pictures": made}
        results.append(Result(f"CLIP score({e.judges.evaluator.name})", of, of_mean(scores), decided))
    return results


def retrieval(e: Evidence) -> list[Result]:
    """R@1 of captions, and with styles of concept and style group by themselves."""
    assert e.judges.evaluator is not None
    results = []
    for of, seen, made in e.looks:
        images, captions = seen.features[e.judges.evaluator.sha256], _captions(seen)
        candidates = len({*captions, *e.judges.others})
        decided = {
            "version": "retrieval/1",
            "evaluator_sha256": e.judges.evaluator.sha256,
            "pictures": made,
            "others_sha256": digest(e.judges.others),
            "styles": None if e.judges.styles is None else e.judges.styles.groups,
        }
        name = f"({e.judges.evaluator.name}, {candidates} captions)"
        if e.judges.styles is None:
            hits = recall_at_1(images, captions, e.judges.evaluator.texts, e.judges.others)
            results.append(_counted(f"R@1{name}", of, share_of(hits), decided, seen, hits))
            continue
        found = concept_and_style(images, captions, e.judges.evaluator.texts, e.judges.styles, e.judges.others)
        results.append(_counted(f"R@1 of concepts{name}", of, share_of(found.concept), decided, seen, found.concept))
        groups = f"({e.judges.evaluator.name}, {len(e.judges.styles.groups)} groups)"
        results.append(_counted(f"R@1 of styles{groups}", of, share_of(found.style), decided, seen, found.style))
    return results


def memorisation(e: Evidence) -> list[Result]:
    """How much nearer pictures are to one training picture than to the next ones."""
    assert e.trained is not None
    results = []
    for extractor in (pixels(), *([e.judges.extractor] if e.judges.extractor is not None else [])):
        known = e.trained.features[extractor.sha256]
        for of, seen, made in e.looks:
            found = copies(seen.features[extractor.sha256], known)
            decided = {
                "version": "memorisation/1",
                "extractor_sha256": extractor.sha256,
                "side": extractor.side,
                "next": NEXT,
                "pictures": made,
                "training_sha256": e.trained.sha256,
            }
            closest = found.ratios.argsort(kind="stable")[:CLOSEST].tolist()
            details = {
                "closest": [
                    {"picture": seen.names[i], "training": e.trained.names[found.nearest[i]], "ratio": found.ratios[i]}
                    for i in closest
                ]
            }
            median = of_median(found.ratios)
            results.append(Result(f"nearest-neighbour ratio({extractor.name})", of, median, decided, details=details))
            name = f"copies({extractor.name}, ratio below {COPIED:.2f})"
            overlap = f"{found.copied.right} real pictures are as near to one of training as a copy: are they held out?"
            notes = (overlap,) if of == "real" and found.copied.right else ()
            results.append(Result(name, of, of_share(found.copied), decided, "%", notes))
    return results


@dataclass(frozen=True)
class Metric:
    """A metric of drawn pictures, and the flags it cannot do without."""

    measure: Callable[[Evidence], list[Result]]
    needs: tuple[str, ...]


METRICS: dict[str, Metric] = {
    "fid": Metric(fid, ("data", "extractor")),
    "kid": Metric(kid, ("data", "extractor")),
    "prdc": Metric(neighbourhood, ("data", "extractor")),
    "clip-score": Metric(clip_score, ("evaluator",)),
    "retrieval": Metric(retrieval, ("evaluator",)),
    "memorisation": Metric(memorisation, ("train_data",)),
}


def measured(name: str, evidence: Evidence) -> list[Result]:
    """The results of one metric. Raises DataError for pictures and captions that it can say nothing of."""
    try:
        return METRICS[name].measure(evidence)
    except LdmError:
        raise
    except ValueError as error:
        raise DataError(f"--metrics {name}: {error}; give it more or other pictures and captions") from None


def _features(e: Evidence, extractor: Extractor) -> tuple[Array, Array]:
    assert e.real is not None
    return e.drawn.features[extractor.sha256], e.real.features[extractor.sha256]


def _against_real(e: Evidence, version: str, **choices: object) -> dict[str, object]:
    """What decides a distance between drawn and real pictures."""
    assert e.judges.extractor is not None and e.real is not None
    return {
        "version": version,
        "extractor_sha256": e.judges.extractor.sha256,
        "side": e.judges.extractor.side,
        "pictures": e.made,
        "real_sha256": e.real.sha256,
        **choices,
    }


def _captions(seen: Look) -> tuple[str, ...]:
    """The captions of all pictures. Raises ValueError where one has none."""
    for name, caption in zip(seen.names, seen.captions, strict=True):
        if not caption:
            raise ValueError(f"picture {name} has no caption, expected one for each")
    return seen.captions


def _counted(
    metric: str, of: str, share: Share, decided: Mapping[str, object], seen: Look, hits: tuple[bool, ...]
) -> Result:
    """A share, with the captions of the misses."""
    missed = [caption for caption, hit in zip(seen.captions, hits, strict=True) if not hit]
    return Result(metric, of, of_share(share), decided, "%", details={"missed": missed})
