"""What train chooses by looking at a file: lines or windows, a length, texts to hold out."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fastvae.atomic_files import check_signature, read_json
from fastvae.cli.inputs import in_place, read_named, regular_file, shown
from fastvae.models.pretrained import WEIGHTS
from fastvae.names import counted, suggestion
from fastvae.presets import TEXTS, Preset, changed, check_effect, configure, defaults, parse
from fastvae.text import Corpus, Survey, survey
from fastvae.text.files import unchanged
from fastvae.text.reading import FILE as READING
from fastvae.text.reading import LINES, NORMALIZERS, TRAIN, VALID, WINDOWS, Reading, load_reading
from fastvae.text.survey import looks_like_lines
from fastvae.training.config import TrainingConfig
from fastvae.training.run_directory import SETTINGS, SETTINGS_SCHEMA

LONGEST = 128  # L of lines that are recognized as such
LARGE = 1024  # tokens of a vocabulary
OPTIONS = "To choose otherwise: --text, --length, --valid, --column, --field, --tokens."


@dataclass(frozen=True)
class Plan:
    """A model and its data.

    Args:
        preset: model and training; its length is set.
        corpus: the training data.
        validation: the validation data, or None.
        notes: sentences about what no option said.
    """

    preset: Preset
    corpus: Corpus
    validation: Corpus | None
    notes: list[str]


def plan_training(
    data: Path,
    out: Path,
    overrides: Mapping[str, str],
    *,
    valid: Path | None = None,
    preset: str | None = None,
    text: str | None = None,
    column: str | None = None,
    field: str | None = None,
    tokens: str | None = None,
    normalize: str | None = None,
    resume: bool = False,
) -> Plan:
    """Open the data of a run in `out`, and choose what the options of `fastvae train` leave open.

    Without `text` and `preset` the file decides between lines and windows; without `valid` a hash
    of each line decides whether it is held out. A run that goes on keeps what it chose.
    """
    if str(data) == str(valid) == "-":
        raise ValueError("standard input can be read once: give a file as --data or --valid")
    before = load_reading(out) if resume else None
    if resume and before is None and (out / WEIGHTS).exists():
        check_signature(out / READING, None, out / WEIGHTS)
    if before and before.part and valid is not None:
        raise ValueError(f"{out} holds out lines of its file: leave --valid out")
    chosen = None if preset is None else configure(preset, overrides)
    kind = chosen.text if text is None and chosen else text
    if kind is None and (column, field, tokens) != (None, None, None):
        kind = "lines"
    if kind is None and before is not None and before.kind == WINDOWS:
        kind = "windows"
    if kind is not None and kind not in TEXTS:
        raise ValueError(f"no text {kind!r}: {suggestion(kind, TEXTS)}")
    reading = in_place(TEXTS[kind or "lines"].reading, column, field)
    if normalize is not None:
        reading = reading.normalized_by(normalize)
    unit = TEXTS[kind or "lines"].unit
    if tokens is not None and (reading.kind == WINDOWS or unit != "character"):
        raise ValueError("--tokens is for lines of characters: leave it out, or say --text lines")
    name = shown(data)
    with regular_file(data) as path, unchanged(path):
        found, cache = None, out / "cache" if path == data else None
        if reading.kind == LINES:
            found = survey(
                path,
                unit=unit,
                tokens=tokens,
                normalize=NORMALIZERS[reading.normalization],
                column=reading.column,
                field=reading.field,
                cache=cache,
            )
        if kind is None and not looks_like_lines(found, _longest(overrides)):
            kind, found = "windows", None
            reading = TEXTS[kind].reading
            if normalize is not None:
                reading = reading.normalized_by(normalize)
        kind = kind or "lines"
        chosen = chosen or configure("small" if kind == "windows" else "lines", overrides)
        if found and not found.vocabulary:
            long = "each line of text has a MiB or more" if found.counts.too_long else None
            raise ValueError(f"{name}: {long or 'all lines are empty'}")
        if not (resume and (out / SETTINGS).exists()):  # a run goes on by the command that began it
            check_effect(chosen, overrides)
        if before and (out / SETTINGS).exists():
            chosen = _as_begun(chosen, overrides, out)
        notes = []
        if (text is None and preset is None) or chosen.length is None:
            if chosen.length is None:
                chosen = replace(chosen, length=_length(chosen, found))
            notes = [f"{name}: {_chosen(kind, reading, chosen, found)}"]
        vocabulary = found and found.vocabulary
        if valid is None and found and (before is None or before.part):
            parts = {part: found.fitting(chosen.length, part) for part in (TRAIN, VALID)}
            if all(parts.values()):
                reading = replace(reading, part=TRAIN)
                lines = counted(parts[VALID], "line")
                held_out = f"{lines} held out for validation, by a hash of each"
            else:
                held_out = "no validation: too few lines to hold any out"
            notes.append(f"{held_out}. {OPTIONS}")
        elif notes and not before:
            notes.append(OPTIONS if valid else f"No validation without --valid. {OPTIONS}")
        if vocabulary and vocabulary.size > LARGE:
            notes.append(
                f"{vocabulary.size:,} different {vocabulary.unit}s make training slow and need "
                "many lines: --text byte-lines has 259"
            )
        if valid is not None and path == valid:
            notes.append(f"{valid} is the training file: its bound tells nothing about other texts")
        corpus = read_named(data, path, chosen.length, reading, vocabulary, cache=cache)
        vocabulary, validation = corpus.vocabulary, None
        if reading.part:
            other = replace(reading, part=VALID)
            validation = read_named(data, path, chosen.length, other, vocabulary, cache=cache)
    if valid is not None:
        kept = None if str(valid) == "-" else cache  # a copy of standard input is never read again
        with regular_file(valid) as path:
            validation = read_named(valid, path, chosen.length, reading, vocabulary, cache=kept)
    return Plan(chosen, corpus, validation, notes)


def _as_begun(preset: Preset, overrides: Mapping[str, str], out: Path) -> Preset:
    """The preset with what the run in `out` computed from its steps, which may be others now."""
    begun = read_json(out / SETTINGS, SETTINGS_SCHEMA)["config"]
    try:
        TrainingConfig.from_dict(begun)
    except ValueError as error:
        raise ValueError(f"{out / SETTINGS}: {error}") from None
    kept = {name: begun[name] for name in preset.shares if name in begun and name not in overrides}
    return changed(preset, kept)


def _longest(overrides: Mapping[str, str]) -> int:
    """The L that lines must fit: the one that is given, or 128."""
    return parse("length", overrides["length"], int) if "length" in overrides else LONGEST


def _length(preset: Preset, found: Survey | None) -> int:
    """The length for a preset that leaves it open: 99 % of the lines fit."""
    if found is None:
        raise ValueError("windows of this preset need a length: give --length")
    model, _ = defaults(preset)
    return found.length(2 ** len(model.get("encoder_channels", ())))


def _chosen(kind: str, reading: Reading, preset: Preset, found: Survey | None) -> str:
    """What was chosen, and how many lines there are."""
    what = TEXTS[kind].description
    for part in ("column", "field"):
        if (name := getattr(reading, part)) is not None:
            what = what.replace("each line", f"{part} {name} of each line")
    how = f"read as {kind} ({what}), length {preset.length}"
    if found is None:
        return f"{how} characters"
    how = f"{how} {found.vocabulary.unit}s"
    fit = sum(found.fitting(preset.length, part) for part in (TRAIN, VALID))
    return (
        f"{how}: {fit:,} of {found.counts.lines:,} lines fit, {found.repeated:,} repeat "
        "an earlier one"
    )
