"""What the marked blocks of README.md and docs/ show: one function a block, from a result file to rows, text or SVG.

A new block of Markdown, rows or a text, is a function here with `block` in front; an SVG file is an entry in CHARTS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
Rows = tuple[Sequence[str], Sequence[Sequence[str]]]

PLAIN = "depth 0"  # the configuration of unfriendly.py that the others are compared with
ALL = "all"  # of a bench report: every category
CHARTED = {"plain": "#9dbfe3", "mtp@4": "#5b93d0", "mtp@auto": "#1f5fa8", "mlx-vlm@4": "#d08a3c"}
FAMILIES = "families.py --runs runs/embedded --joint-runs runs/joint --plot docs/images/families.png"
HEADLINE = "lookup+auto@auto"  # what a user of the real model is told to take
ARMS = {"stock": "stock mlx-lm", "plain": "mlx_mtp, plain", "mtp@2": "mlx_mtp, 2 drafts", "mtp@4": "mlx_mtp, 4 drafts",
        "mtp@auto": "mlx_mtp, auto", "lookup@auto": "mlx_mtp, lookup", "mlx-vlm@4": "mlx-vlm, 4 drafts"}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """file: in benchmarks/results. script: what wrote it, with options, where the file itself names no command."""

    file: str
    script: str
    show: Callable[[Results], Any]

    def made_by(self, results: Results) -> str:
        """The command that gave these results."""
        script = f"python benchmarks/{self.script} --json benchmarks/results/{self.file}"
        return str(results.get("command", script))


TABLES: dict[str, Block] = {}


def block(file: str, script: str = "") -> Callable[[Callable[[Results], Any]], Callable[[Results], Any]]:
    """Decorator: the function shows this file between the marks that bear its name, with hyphens."""

    def add(show: Callable[[Results], Any]) -> Callable[[Results], Any]:
        TABLES[show.__name__.replace("_", "-")] = Block(file, script, show)
        return show

    return add


def ratio(row: Results) -> str:
    """'2.01 [1.55, 2.62]': median and 95 % interval, in either form that results have; without one the median."""
    low, high = row["interval"] if "interval" in row else (row["low"], row["high"])
    return f"{row['ratio']:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def rates(values: Sequence[float]) -> str:
    """'66 58 49 %'; nothing of none."""
    return " ".join(f"{100 * value:.0f}" for value in values) + " %" if values else ""


def cell(row: Results, name: str, form: str = "{}") -> str:
    """A figure; nothing where the row has none."""
    return form.format(row[name]) if name in row else ""


def arms_of(sampling: Results, category: str = ALL) -> dict[str, Results]:
    """A bench report's rows by configuration, of one category or of all."""
    (group,) = (group for group in sampling["groups"] if group["category"] == category)
    return {arm["arm"]: arm for arm in group["arms"]}


def temperature(sampling: Results) -> str:
    """'T = 0', without the filters."""
    return f"T = {sampling['sampling']['temperature']:g}"


@block("bench-smollm2.json")
def headline(results: Results) -> str:
    """The real model's drafts over stock in a sentence, and another on where that was measured."""
    found = []
    for sampling in results["samplings"]:
        over, heat = arms_of(sampling)[HEADLINE]["over_stock"], sampling["sampling"]["temperature"]
        found.append(f"**{over['ratio']:.2f} times** [{over['low']:.2f}, {over['high']:.2f}] at temperature {heat:g}")
    cores, system = results["machine"]["cores"], results["machine"]["system"].split()[0]
    prompts = results["samplings"][0]["groups"][0]["prompts"]
    return (
        f"Speed over stock mlx-lm, which does not draft, with the same weights: {' and '.join(found)}, with 95 % "
        f"intervals. Measured on {cores} CPU cores of a {system} machine with SmolLM2-135M, the drafter that comes "
        f"with it and a lookup in front (`--drafter lookup+auto`), on {prompts} kinds of prompts."
    )


@block("acceptance-smollm2.json", "acceptance.py --model smollm2 --drafters auto,parallel --asked "
       "benchmarks/handwritten.jsonl --depth 3")  # fmt: skip
def handwritten(results: Results) -> Rows:
    """A row for every kind of prompts: of both drafters, drafts accepted with all before them, and tokens a round."""
    drafters = [f"{name}: {what}" for name in ("sequential", "parallel") for what in ("accepted", "tokens a round")]
    kinds = [kind for kind in results["auto"] if kind != "depth"]
    rows = []
    for kind in kinds:
        found = [results[name][kind] for name in ("auto", "parallel")]
        cells = [cell for one in found for cell in (rates(one["acceptance_of_all"]), f"{one['tokens_per_round']:.2f}")]
        rows.append([kind, str(found[0]["prompts"]), *cells])
    return ("prompts", "number", *drafters), rows


@block("bench.json")
def speed(results: Results) -> Rows:
    """A row for every configuration: over stock and tokens a pass, by temperature."""
    samplings = results["samplings"]
    heads = ["configuration", *(f"speed, {temperature(s)}" for s in samplings),
             *(f"tokens a pass, {temperature(s)}" for s in samplings)]  # fmt: skip
    found = [arms_of(s) for s in samplings]
    rows = []
    for name in found[0]:
        taus = [arms[name]["tau"] for arms in found]
        rows.append([ARMS.get(name, name), *(ratio(arms[name]["over_stock"]) for arms in found),
                     *("" if tau is None else f"{tau:.2f}" for tau in taus)])  # fmt: skip
    return heads, rows


@block("bench.json")
def speed_by_category(results: Results) -> Rows:
    """A row for every category at the first temperature."""
    sampling = results["samplings"][0]
    rows = [
        [group["category"], *(ratio(arm["over_stock"]) for arm in group["arms"] if arm["arm"] != "stock")]
        for group in sampling["groups"] if group["category"] != ALL
    ]  # fmt: skip
    arms = [name for name in arms_of(sampling) if name != "stock"]
    return (temperature(sampling), *(ARMS.get(name, name) for name in arms)), rows


@block("bench.json")
def bench_acceptance(results: Results) -> Rows:
    """Speed in tokens and acceptance by position."""
    rows = []
    for sampling in results["samplings"]:
        for name, arm in arms_of(sampling).items():
            rate = arm["tokens_per_second"]
            speeds = f"{rate['median']:.0f} ({rate['low']:.0f} to {rate['high']:.0f})"
            rows.append([f"{ARMS.get(name, name)}, {temperature(sampling)}", speeds, rates(arm["acceptance"] or ())])
    return ("configuration", "tokens/s (range)", "acceptance by position"), rows


@block("cost-model.json")
def cost_model(results: Results) -> Rows:
    """What a round is made of, and what the cost model makes of it beside the measurement."""
    parts = "verify", "draft", "gap"
    rows = [
        [f"{ARMS.get(name, name)}, {sampling.split(',')[0]}", *(f"{row[f'{part}_milliseconds']:.2f}" for part in parts),
         f"{row['measured']:.2f}", f"{row['predicted']:.2f}", f"{row['deviation']:+.0%}"]
        for sampling, arms in results["samplings"].items() for name, row in arms.items()
    ]  # fmt: skip
    return ("configuration", "pass, ms", "drafts, ms", "gap, ms", "over stock", "predicted", "off by"), rows


@block("unfriendly.json", "unfriendly.py --repeats 30")
def unfriendly(results: Results) -> Rows:
    """A row for every text: each configuration's speed over plain decoding."""
    found = {name: arms for name, arms in results.items() if name not in ("about", "command")}
    arms = [name for name in next(iter(found.values())) if name != PLAIN]
    rows = [[name, f"1.00 ({row[PLAIN]['tokens_per_second']:.0f} tokens/s)", *(ratio(row[arm]) for arm in arms),
             f"{row[arms[-1]]['drafted_rounds']:.1%}"] for name, row in found.items()]  # fmt: skip
    return ("text", "plain", *arms, "of its rounds drafted"), rows


@block("verify-cost.json", "verify_cost.py")
def verify_cost(results: Results) -> Rows:
    """Milliseconds of a pass of M tokens."""
    times = results["verify_milliseconds"]
    rows = [[str(m), f"{time:.2f}", f"{time / times[0]:.2f}"] for m, time in enumerate(times, 1)]
    rows.append(["1, stock mlx-lm", f"{results['mlx_lm_step_milliseconds']:.2f}",
                 f"{results['mlx_lm_step_milliseconds'] / times[0]:.2f}"])  # fmt: skip
    return ("tokens of the pass", "ms", "over one token"), rows


@block("verify-cost.json", "verify_cost.py")
def rounds(results: Results) -> Rows:
    """What a round of each depth is made of."""
    heads = ("drafts", "round, ms", "of it one draft step", "in the loop, ms", "device idle", "built in Python, ms")
    rows = [
        [depth, f"{row['device_milliseconds']:.2f}", f"{row['draft_step_milliseconds']:.2f}" if depth != "0" else "",
         f"{row['wall_milliseconds']:.2f}", f"{row['idle_share']:.0%}", f"{row['host_milliseconds']:.2f}"]
        for depth, row in results["rounds"].items()
    ]  # fmt: skip
    return heads, rows


@block("soak.json", "soak.py")
def memory(results: Results) -> Rows:
    """Active megabytes early and late in long replies, and over many short requests."""
    rows = []
    for reply in sorted({row["reply"] for row in results["long"]}):
        mine = [row for row in results["long"] if row["reply"] == reply]
        first, last = mine[0], mine[-1]
        rows.append([f"reply {reply + 1}: after {first['tokens']:,.0f} and {last['tokens']:,.0f} tokens",
                     f"{first['active_megabytes']:.1f}", f"{last['active_megabytes']:.1f}"])  # fmt: skip
    short = results["requests"]
    rows.append(["short requests, a third of them dropped: the first 50 and the last 50",
                 f"{short['first 50']:.1f}", f"{short['last 50']:.1f}"])  # fmt: skip
    return ("", "active MB", "active MB"), rows


@block("soak.json", "soak.py")
def context(results: Results) -> Rows:
    """What a round costs after a short and a long context."""
    short, long = ((n, results["context"][n]) for n in sorted(results["context"], key=int))
    rows = [[name, f"{short[1][name]:.2f}", f"{long[1][name]:.2f}", f"{long[1][name] / short[1][name]:.2f}"]
            for name in short[1]]  # fmt: skip
    return ("", f"ms at {int(short[0]):,} tokens", f"ms at {int(long[0]):,}", "ratio"), rows


@block("compiled.json", "compiled.py")
def compiled(results: Results) -> Rows:
    """Rounds compiled once against rounds whose graph is built anew."""
    rows = [[f"{depth} drafts, {name}", f"{row['build_milliseconds']:.2f}", f"{row['wall_milliseconds']:.2f}"]
            for depth, ways in results.items() for name, row in ways.items()]  # fmt: skip
    return ("round", "built in Python, ms", "in the loop, ms"), rows


@block("training.json", "training.py")
def training(results: Results) -> Rows:
    """Training speed beside mlx-lm's trainer."""
    base = results["tokens_per_second"]["mlx-lm"]
    rows = [[name, f"{speed:,.0f}", f"{speed / base:.2f}"] for name, speed in results["tokens_per_second"].items()]
    return ("trainer", "tokens/s", "ratio"), rows


@block("training-memory.json", "training_memory.py")
def training_memory(results: Results) -> Rows:
    """Peak memory of a training step by number of heads."""
    counts = list(next(iter(results["peak_bytes"].values())))
    rows = [[f"logits {name}", *(f"{peaks[n] / 1e6:.0f} MB" for n in counts)]
            for name, peaks in results["peak_bytes"].items()]  # fmt: skip
    return ("", *(f"{n} heads" if n != "1" else "1 head" for n in counts)), rows


@block("families.json", FAMILIES)
def families(results: Results) -> Rows:
    """The drafter families on one target."""
    heads = ("drafter", "speed over stock mlx-lm", "drafts", "tokens a round", "drafts accepted, by position",
             "drafts, ms a round", "parameters", "trained")  # fmt: skip
    rows = [
        [name, ratio(row), cell(row, "depth"), cell(row, "tokens_per_round", "{:.2f}"),
         rates(row.get("acceptance", ())), cell(row, "draft_milliseconds", "{:.2f}"),
         f"{row['parameters'] / 1e6:.2f} M" if "parameters" in row else "", cell(row, "training_minutes", "{:.0f} min")]
        for name, row in results["arms"].items()
    ]  # fmt: skip
    return heads, rows


@block("families.json", FAMILIES)
def main_head(results: Results) -> Rows:
    """What an auxiliary objective does to the next token's loss."""
    losses = results["main_head_held_out_loss"]
    names = {"alone": "the next token alone", "parallel": "with parallel heads",
             "sequential": "with a sequential module"}  # fmt: skip
    rows = [[text, f"{losses[name]:.3f}", f"{losses[name] - losses['alone']:+.3f}" if name != "alone" else ""]
            for name, text in names.items()]  # fmt: skip
    return (f"trained {losses['steps']} steps on", "held-out loss of the next token, nats", "difference"), rows


@block("adapt.json", "adapt.py --out runs/adapt")
def adapt(results: Results) -> Rows:
    """What fine-tuning a drafter won back."""
    gain = results["after"] / results["before"] - 1
    row = [f"{results['before']:.2f}", f"{results['after']:.2f}", f"{gain:+.0%}", f"{results['minutes']:.0f} min"]
    return ("tokens a round before", "after", "gain", "time"), [row]


@block("masks.json", "constrained.py masks --model FOLDER")
def masks(results: Results) -> Rows:
    """What the masks of a round cost."""
    rows = [[depth, f"{row['median']:.2f}", f"{row['p99']:.2f}"] for depth, row in results["rounds"].items()]
    return ("drafts", f"masks of a round over {results['vocabulary']:,} tokens, ms", "99th percentile"), rows


@block("constrained.json", "constrained.py speed --model smollm2 --drafter lookup+auto --max-tokens 160")
def held(results: Results) -> Rows:
    """Answers held to a schema beside the same answers free."""
    names = "held over free", "held over held plainly"
    rows = [
        [task, str(row["tokens"]), f"{row['tokens_per_round']['held']:.2f}", *(f"{row[name]:.2f}" for name in names)]
        for task, row in results["tasks"].items() if row["same text"]
    ]  # fmt: skip
    mean = ["geometric mean", "", "", *(f"{results[name]:.2f}" for name in names)]
    return ("answer", "tokens", "tokens a round", *names), [*rows, mean]


@block("documents.json", "constrained.py documents [--model smollm2]")
def documents(results: Results) -> Rows:
    """Answers to many schemas, and how many of them are invalid."""
    heads = "asked", "complete", "ended by length", "invalid", "drafted", "accepted"
    return ("model", *heads), [[model, *(f"{row.get(name, 0):,}" for name in heads)] for model, row in results.items()]


@block("real.json", "real.py equality")
def real_equality(results: Results) -> Rows:
    """Greedy replies beside stock mlx-lm's, a row for every form of every real model."""
    heads = ("model", "weights", "replies", "plain", "with drafts", "tokens a round", "peak, MB", "stock mlx-lm's, MB")
    rows = []
    for model in results["equality"].values():
        for form, found in model["forms"].items():
            prompts, peaks = found["prompts"].values(), found["peak_megabytes"]
            longest = max(prompt["prompt_tokens"] for prompt in prompts) + found["tokens"]
            drafted = [name for name in peaks if name not in ("stock mlx-lm", "plain")]
            taus = [prompt["tokens_per_round"][name] for prompt in prompts for name in drafted]
            rows.append([
                model["title"], form, f"{len(prompts)} of {found['tokens']} tokens, up to token {longest:,}",
                _same([prompt["differs"]["plain"] for prompt in prompts]),
                _same([prompt["differs"][name] for prompt in prompts for name in drafted]),
                " to ".join(dict.fromkeys([f"{min(taus):.2f}", f"{max(taus):.2f}"])) if taus else "",
                f"{peaks['plain']:,.0f}", f"{peaks['stock mlx-lm']:,.0f}",
            ])  # fmt: skip
    return heads, rows


def _same(differs: Sequence[Results | None]) -> str:
    """'4 of 5 equal (from token 137 on, logits apart by 0.0003)'."""
    found = [f"from token {each['at'] + 1} on, logits apart by {each['gap']:.1g}" for each in differs if each]
    return f"{len(differs) - len(found)} of {len(differs)} equal" + (f" ({'; '.join(found)})" if found else "")


@block("real.json", "real.py speed")
def real_speed(results: Results) -> Rows:
    """Speed of real models over stock mlx-lm, a row for every prompt."""
    models = results.get("speed", {}).values()
    names = list(dict.fromkeys(name for model in models for row in model["prompts"].values() for name in row))[1:]
    rows = [
        [f"{model['title']}, {prompt}", f"{row['stock mlx-lm']['tokens_per_second']:.1f}",
         *(ratio(row[name]) if name in row else "" for name in names)]
        for model in models for prompt, row in model["prompts"].items()
    ]  # fmt: skip
    return ("model and prompt", "stock mlx-lm, tokens/s", *names), rows


def speed_chart(results: Results) -> str:
    """Bars with intervals, one group a category; its own light background, for pages of any colour."""
    samplings = results["samplings"]
    shown = [(s, ALL) for s in samplings] + [(samplings[0], group["category"]) for group in samplings[0]["groups"]]
    groups = {f"{category}, {temperature(s)}": arms_of(s, category) for s, category in shown}
    names = [name for name in CHARTED if name in next(iter(groups.values()))]
    left, width, bar, gap, top = 170, 560, 14, 14, 74
    step = len(names) * bar + gap
    scale = width / (1.08 * max(arms[name]["over_stock"]["high"] for arms in groups.values() for name in names))
    height = top + len(groups) * step + 50
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 40} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" rx="8" fill="#fbfbf9"/>',
        '<text x="16" y="24" font-size="15" font-weight="bold">Speed over stock mlx-lm decoding the same weights'
        "</text>",
    ]
    at = 16.0
    for name in names:
        out.append(f'<rect x="{at:.0f}" y="38" width="11" height="11" fill="{CHARTED[name]}"/>'
                   f'<text x="{at + 16:.0f}" y="48">{ARMS[name]}</text>')  # fmt: skip
        at += 36 + 6.4 * len(ARMS[name])
    one = left + scale
    out.append(f'<path d="M{one:.1f} {top - 6}V{height - 48}" stroke="#222" stroke-dasharray="3 3"/>')
    for g, (group, arms) in enumerate(groups.items()):
        y = top + g * step
        out.append(f'<text x="{left - 10}" y="{y + len(names) * bar / 2 + 4:.0f}" text-anchor="end">{group}</text>')
        for i, name in enumerate(names):
            out.append(_bar(arms[name]["over_stock"], left, y + i * bar, bar, scale, CHARTED[name]))
    settings, machine = results["settings"], results["machine"]
    notes = (
        f"Embedded model, {settings['tokens']} tokens a run, {settings['repeats']} turns a prompt, 95 % intervals.",
        f"{machine['name']}, {machine['cores']} cores, {machine['system']}"
        + (", Metal." if machine["metal"] else f", on the CPU with {machine['blas'].split(' (')[0]}. Not a Mac."),
    )
    for i, note in enumerate(notes):
        out.append(f'<text x="16" y="{height - 28 + 16 * i}" font-size="11" fill="#555">{note}</text>')
    out.append("</svg>\n")
    return "\n".join(out)


def _bar(over: Results, left: int, y: int, thick: int, scale: float, colour: str) -> str:
    """One bar with its interval and its figure."""
    low, high = (left + scale * over[end] for end in ("low", "high"))
    middle = y + thick / 2 - 1
    return (f'<rect x="{left}" y="{y}" width="{scale * over["ratio"]:.1f}" height="{thick - 2}" fill="{colour}"/>'
            f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6" '
            f'stroke="#222" fill="none"/>'
            f'<text x="{high + 6:.1f}" y="{y + 11}" font-size="11" paint-order="stroke" stroke="#fbfbf9" '
            f'stroke-width="4">{over["ratio"]:.2f}</text>')  # fmt: skip


CHARTS = {"docs/images/speed.svg": Block("bench.json", "", speed_chart)}
