"""The `beats-ray` command: `beats-ray COMMAND [CONFIG.yaml] [section.field=value ...]`.

Thin: each subcommand reads its config, checks what can be checked at once, opens the cluster, and calls one function
of the package. Ray and PyTorch are imported only where a job starts, so that `--help` and every mistake answer at once.
Exit status: 0 done, 1 failed, 2 the user's mistake (one line on stderr), 130 stopped with Ctrl-C.
"""

import difflib
import importlib
import os
import re
import signal
import sys
import traceback
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import click
import yaml

from beats_ray import __version__, config
from beats_ray.bench.cases import ABOUT
from beats_ray.capacity.settings import PlanConfig, SimulateConfig
from beats_ray.config import Job, UserError, load_config
from beats_ray.console import Console
from beats_ray.errors import find_user_error
from beats_ray.job_status import JobStatus, submission_id

OVERRIDE = re.compile(r"[A-Za-z_][\w.\-]*=")
SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


@dataclass(frozen=True)
class Command:
    """One subcommand that takes a config and runs a job on the cluster."""

    kind: type[Job]
    entry: str
    """`module:function` below `beats_ray`; called with the config and the console, returns (label, uri) pairs."""
    help: str
    needs: tuple[str, ...] = ()
    """Fields that must be set to something that exists; `a|b` means one of the two, `a?` that it may be empty."""
    has_dry_run: bool = False
    """Whether `--dry-run` shows the plan of the run."""
    has_plan: bool = False
    """Whether `--plan` shows which stages would run."""
    has_resume: bool = False
    """Whether `--resume` asks for a run that is there already; without it the command goes on where there is one."""


COMMANDS = {
    "pretrain": Command(
        config.PretrainConfig,
        "train.jobs:run_pretrain",
        "Pre-train an encoder on masked tokenizer labels.",
        ("data.path", "tokenizer?", "labels?", "initial?"),
        has_dry_run=True,
    ),
    "train-tokenizer": Command(
        config.DistillConfig,
        "train.jobs:run_distill",
        "Distil an encoder into the next iteration's tokenizer.",
        ("data.path", "teacher"),
        has_dry_run=True,
    ),
    "tokenize": Command(
        config.TokenizeConfig,
        "tokenize:run_tokenize",
        "Compute the patch labels of a whole data set.",
        ("data.path", "tokenizer"),
    ),
    "finetune": Command(
        config.FinetuneConfig,
        "train.jobs:run_finetune",
        "Fine-tune an encoder into a classifier.",
        ("data.path", "encoder"),
        has_dry_run=True,
    ),
    "sweep": Command(
        config.SweepConfig,
        "tune.sweep:run_sweep",
        "Search fine-tuning settings with Ray Tune.",
        ("data.path", "encoder|encoders", "sweep.warm_start?"),
        has_resume=True,
    ),
    "cross-validate": Command(
        config.CrossValidateConfig,
        "cross_validate:run_cross_validate",
        "Fine-tune on every fold but one, in turn, and compare encoders.",
        ("data.path", "encoder|encoders"),
    ),
    "iterate": Command(
        config.IterateConfig,
        "iterate:run_iterate",
        "Run whole BEATs iterations, from where they stopped.\n\nA stage that is done stays done; where a setting, a "
        "given model or the data changed, the stages that depend on it run again, and what they had made is kept "
        "beside them. See which with --plan.",
        ("data.path", "start.encoder?", "start.tokenizer?"),
        has_plan=True,
    ),
    "convergence": Command(
        config.ConvergenceConfig,
        "convergence:run_convergence",
        "Show over several seeds whether pre-training helps.",
        ("data.path", "judged"),
    ),
    "evaluate": Command(
        config.EvaluateConfig,
        "evaluate:run_evaluate",
        "Evaluate an encoder, a classifier or an ensemble.",
        ("data.path", "model|models"),
    ),
}


class _Group(click.Group):
    """Commands in the order of a project's life, and the nearest name for a mistyped one."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        others = [
            "predict", "embed", "import", "export", "report", "bench", "plan", "simulate", "check-cluster",
        ]  # fmt: skip
        return ["demo", "prepare", *COMMANDS, *others]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            near = difflib.get_close_matches(name, self.commands, 1, 0.6)
            hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(self.list_commands(ctx))}"
            raise UserError(f"unknown command {name!r}; {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="beats-ray")
@click.pass_context
def cli(context: click.Context) -> None:
    """Pre-train BEATs audio encoders and fine-tune them on a Ray cluster.

    Stages of a run take settings as a YAML file, as section.field=value, or both. Paths are local, s3://bucket/key or
    gs://bucket/key; endpoint and keys of the object store come from the standard AWS or Google environment variables.
    """
    if context.invoked_subcommand is None:
        raise UserError(f"no command given; choose one of {', '.join(cli.list_commands(context))}")


def _describe_fields(kind: type[config.Section], prefix: str = "", defaults: config.Section | None = None) -> str:
    """Every setting of a config with its default, which may be that of its section, and the paper's value."""
    lines = []
    for name, field in kind.model_fields.items():
        default = field.default if defaults is None else getattr(defaults, name)
        if isinstance(default, config.Section):
            lines.append(_describe_fields(type(default), f"{prefix}{name}.", default))
        else:
            choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is typing.Literal else ()
            others = "".join(f" | {one}" for one in choices if one != default)
            others = others if len(others) < 50 else " | ..."
            shown = "" if field.is_required() or default in ("", {}, ()) else f" [{default}{others}]"
            text = " ".join((field.description or "").split())
            first, *papers = re.split(r" (?=Paper\b[^:.]*: )", text)
            said = [re.split(r"\.\s|;", first)[0], *(re.split(r"\.\s", one)[0] for one in papers)]
            lines.append(
                f"  {prefix}{name}{shown if len(shown) < 60 else ''}  {'. '.join(one.rstrip('.') for one in said)}"
            )
    return "\n".join(lines) if prefix else "\b\nSettings [default | others]:\n" + "\n".join(lines)


_KINDS = typing.get_args(config.PrepareConfig.model_fields["kind"].annotation)


def _add(name: str, command: Command) -> None:
    @cli.command(name, help=command.help, epilog=_describe_fields(command.kind))
    @click.argument("arguments", metavar="[CONFIG.yaml] [section.field=value ...]", nargs=-1)
    @click.option("--show-config", is_flag=True, help="Print the complete settings as YAML and stop.")
    def run_command(
        arguments: tuple[str, ...],
        show_config: bool,
        dry_run: bool = False,
        plan: bool = False,
        tflops: float = 0.0,
        resume: bool = False,
    ) -> int:
        paths, overrides = split_arguments(arguments)
        if len(paths) > 1:
            raise UserError(f"{name} takes one config file, got {' '.join(paths)}; settings are section.field=value")
        path = paths[0] if paths else None
        if dry_run:
            return _complain_all(_load("train.preflight:dry_run")(command.kind, path, overrides, Console()))
        if plan:
            return _complain_all(_load("iterate_plan:show_plan")(path, overrides, tflops, Console()))
        settings = load_config(command.kind, path, overrides)
        if show_config:
            click.echo(to_yaml(settings), nl=False)
            return 0
        for need in command.needs:
            _check_place(settings, need)
        if resume:
            _require_begun(settings)
        _run_on_cluster(name, settings.ray, lambda console: _load(command.entry)(settings, console))
        return 0

    if command.has_dry_run:
        text = "Check everything that needs no cluster, print what the run will compute, hold and write, and stop."
        click.option("--dry-run", is_flag=True, help=text)(run_command)
    if command.has_resume:
        text = "Go on with what OUTPUT holds, as the command does by itself; a mistake where it holds nothing."
        click.option("--resume", is_flag=True, help=text)(run_command)
    if command.has_plan:
        text = "Show every stage, whether it would run and why, with its clips, FLOPs and GPU-hours, and stop."
        click.option("--plan", is_flag=True, help=text)(run_command)
        text = "TFLOP/s that a GPU sustains, for the GPU-hours of --plan."
        kind = click.FloatRange(min=0, min_open=True)
        click.option("--tflops", type=kind, default=100.0, show_default=True, metavar="N", help=text)(run_command)


def _complain_all(mistakes: list[str]) -> int:
    """Status 2 and a line for every mistake, or status 0 where there is none."""
    for mistake in mistakes:
        _complain(mistake)
    return 2 if mistakes else 0


@cli.command(epilog="Settings of the run, as in `iterate`: pretrain.train.steps=200, sweep.num_trials=4, ...")
@click.argument("overrides", metavar="[section.field=value ...]", nargs=-1)
@click.option("--data", metavar="DIR|s3://...|gs://...", help="Folder in ESC-50's layout; without it, sample clips.")
@click.option("--budget", metavar="MIN", type=click.FloatRange(min=0, min_open=True), default=12.0, show_default=True,
              help="Minutes that the run is scaled to.")  # fmt: skip
@click.option("--output", metavar="DIR", default="runs/demo", show_default=True, help="Folder of the run.")
def demo(overrides: tuple[str, ...], data: str | None, budget: float, output: str) -> None:
    """Run the whole chain, small, on this machine."""
    paths, changes = split_arguments(overrides)
    if paths:
        raise UserError(f"demo: {paths[0]!r} is neither an option nor section.field=value; a data folder is --data DIR")
    if data is not None:
        _require_exists("--data", data)
    console = Console()
    try:
        console.written(_load("demo:run_demo")(data, budget, output, changes, console))
    finally:
        console.close()


@cli.command(
    epilog=f"KIND is the layout of the source: {', '.join(_KINDS)}.\n\n{_describe_fields(config.PrepareConfig)}"
)
@click.argument("arguments", metavar="KIND SRC DST [section.field=value ...]", nargs=-1)
@click.option(
    "--verify", "verify_path", metavar="DST", help="Read a prepared data set again and account for every file."
)
def prepare(arguments: tuple[str, ...], verify_path: str | None) -> None:
    """Turn raw clips into checked 16 kHz shards."""
    paths, overrides = split_arguments(arguments)
    if verify_path is not None:
        _verify(verify_path, paths, overrides)
        return
    if len(paths) == 3:
        kind, source, output = paths
        settings = load_config(config.PrepareConfig, None, overrides, kind=kind, source=source, output=output)
    elif arguments and (not paths or (len(paths) == 1 and paths[0].endswith((".yaml", ".yml")))):
        settings = load_config(config.PrepareConfig, paths[0] if paths else None, overrides)
    else:
        raise UserError(f"prepare takes KIND SRC DST (or a config file), got {' '.join(paths) or 'nothing'}")
    _load("data.prepare:check_source")(settings)

    def job(console: Console) -> list[tuple[str, str]]:
        console.stage(f"prepare {settings.source}")
        manifest = _load("data.prepare:prepare")(settings, console.progress)
        missing = f", {manifest.missing} named but missing" if manifest.missing else ""
        console.note(
            f"{manifest.clips} clips, {manifest.seconds / 3600:.2f} h; {manifest.quarantined} files quarantined, "
            f"{manifest.skipped} skipped{missing}"
        )
        return [("data set", settings.output)]

    _run_on_cluster("prepare", settings.ray, job)


def _verify(dataset: str, paths: list[str], overrides: list[str]) -> None:
    if paths:
        raise UserError(f"prepare --verify takes the prepared data set alone, got {' '.join(paths)} too")
    from beats_ray.data.manifest import read_manifest

    settings = load_config(config.VerifyConfig, None, overrides)
    read_manifest(_require_exists("dataset", dataset))

    def job(console: Console) -> list[tuple[str, str]]:
        console.stage(f"verify {dataset}")
        console.note(str(_load("data.verify:verify")(dataset, console.progress, settings.data.retry_seconds)))
        return []

    _run_on_cluster("verify", settings.ray, job)


@cli.command(epilog=_describe_fields(config.EmbedConfig))
@click.argument("arguments", metavar="MODEL SRC DST [section.field=value ...]", nargs=-1)
def embed(arguments: tuple[str, ...]) -> None:
    """Write the embeddings of a prepared data set as Parquet."""
    paths, overrides = split_arguments(arguments)
    if len(paths) == 3:
        model, source, output = paths
        values: dict[str, Any] = {"model": model, "output": output, "data": {"path": source}}
        settings = load_config(config.EmbedConfig, None, overrides, **values)
    elif len(paths) == 1 and paths[0].endswith((".yaml", ".yml")):
        settings = load_config(config.EmbedConfig, paths[0], overrides)
    else:
        raise UserError(f"embed takes MODEL SRC DST (or a config file), got {' '.join(paths) or 'nothing'}")
    for need in ("data.path", "model"):
        _check_place(settings, need)
    _run_on_cluster("embed", settings.ray, lambda console: _load("embed:run_embed")(settings, console))


@cli.command("import")
@click.argument("source", metavar="FILE")
@click.argument("target", metavar="DST")
def import_model(source: str, target: str) -> None:
    """Turn a released or ESPnet checkpoint into a model folder."""
    console = Console()
    console.written(_load("convert:run_import")(source, target, console))


@cli.command("export", epilog="The ending of DST names the format: .pt (released BEATs), .onnx, .pt2 (torch.export).")
@click.argument("source", metavar="MODEL")
@click.argument("target", metavar="DST")
def export_model(source: str, target: str) -> None:
    """Write a model for other programs: released format, ONNX, torch.export."""
    console = Console()
    console.written(_load("convert:run_export")(source, target, console))


@cli.command()
@click.argument("model")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--top-k", type=click.IntRange(min=1), default=3, show_default=True, help="Labels shown for each file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def predict(model: str, files: tuple[str, ...], top_k: int, as_json: bool) -> None:
    """Name what is heard in audio files."""
    for name, path in [("model", model), *(("file", file) for file in files)]:
        _require_exists(name, path)
    _load("predict:run_predict")(model, list(files), top_k, as_json)


def _describe_benches() -> str:
    lines = []
    for name, text in ABOUT.items():
        own = " ".join(f"{key}={value}" for key, value in config.BenchConfig.defaults.get(name, {}).items())
        lines.append(f"  {name}: {text}{f'; by default {own}' if own else ''}")
    return "\b\nBenchmarks:\n" + "\n".join(lines) + "\n\n" + _describe_fields(config.BenchConfig)


@cli.command(epilog=_describe_benches())
@click.argument("name", metavar="BENCHMARK", type=click.Choice(list(ABOUT)))
@click.argument("overrides", metavar="[field=value ...]", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
@click.option("--store", is_flag=True, help="guard: store the ratios that are measured instead of comparing them.")
def bench(name: str, overrides: tuple[str, ...], as_json: bool, store: bool) -> int:
    """Measure speed and memory beside what one would use instead.

    `guard` compares the ratios of several of these with stored ones and fails on a loss of over 15 %.
    """
    if name == "guard" and (overrides or as_json):
        given = overrides[0] if overrides else "--json"
        raise UserError(f"bench guard {given}: takes nothing but --store; its settings are in bench/ratios.yaml")
    if name != "guard" and store:
        raise UserError(f"bench {name} --store: only guard stores ratios; leave --store out")
    console = Console()
    try:
        if name == "guard":
            return int(_load("bench.guard:run_guard")(console, store))
        settings = load_config(config.BenchConfig, None, list(overrides), name=name)
        return int(_load("bench.run:run_bench")(settings, console, as_json))
    finally:
        console.close()


@cli.command("check-cluster")
@click.argument("paths", metavar="FILE|DIR...", nargs=-1, required=True)
def check_cluster(paths: tuple[str, ...]) -> int:
    """Check files that start clusters: `ray up`, Kubernetes, IAM."""
    found, mistakes = _load("clusters.check:check_files")(paths)
    if not mistakes:
        for line in found:
            click.echo(f"{line}: sound")
    return _complain_all(mistakes)


@cli.command(epilog=_describe_fields(PlanConfig))
@click.argument("arguments", metavar="CONFIG.yaml [section.field=value ...]", nargs=-1)
@click.option("--cluster", metavar="FILE.yaml", help="Settings put on top of CONFIG: a cluster and its prices.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def plan(arguments: tuple[str, ...], cluster: str | None, as_json: bool) -> int:
    """Say how long `iterate` takes on a cluster, what it needs there, and what it costs.

    CONFIG is a config of `iterate`. A data set that is not prepared yet is described by planned_data.hours=5000.
    """
    paths, overrides = split_arguments(arguments)
    if len(paths) > 1:
        raise UserError(f"plan takes one config file, got {' '.join(paths)}; a cluster's settings go in --cluster FILE")
    path = paths[0] if paths else None
    return _complain_all(_load("capacity.show:show_plan")(path, overrides, cluster, as_json, Console()))


@cli.command(epilog=_describe_fields(SimulateConfig))
@click.argument("arguments", metavar="[CONFIG.yaml] [field=value ...]", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of tables.")
def simulate(arguments: tuple[str, ...], as_json: bool) -> None:
    """Simulate a large run on spot nodes: goodput, distance between checkpoints, limits of the data plane."""
    paths, overrides = split_arguments(arguments)
    if len(paths) > 1:
        raise UserError(f"simulate takes one config file, got {' '.join(paths)}")
    settings = load_config(SimulateConfig, paths[0] if paths else None, overrides)
    _load("capacity.simulate:run_simulate")(settings, Console(), as_json)


@cli.command()
@click.argument("run_folder", metavar="RUN")
@click.option("--format", "formats", type=click.Choice(("html", "md", "json")), multiple=True, default=("html",),
              help="What to write; may be given several times. Default: html.")  # fmt: skip
@click.option("--output", metavar="DIR", help="Write there instead of into RUN.")
@click.option("--no-audio", is_flag=True, help="Leave the excerpts of confused clips out of the page.")
@click.option("--curves", metavar="DIR", help="Write loss and perplexity of every iteration there too, as SVG files.")
def report(run_folder: str, formats: tuple[str, ...], output: str | None, no_audio: bool, curves: str | None) -> None:
    """Write report.html of a run, finished or not: of iterate, sweep, a training, evaluate or cross-validate."""
    _require_exists("run", run_folder)
    written = _load("report:write_report")(run_folder, formats, output, not no_audio)
    if curves is not None:
        written += _load("report:write_curves")([run_folder], curves)
    Console().written(written)


def split_arguments(arguments: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Plain arguments and `section.field=value` overrides, each in their order."""
    overrides = [argument for argument in arguments if OVERRIDE.match(argument)]
    return [argument for argument in arguments if not OVERRIDE.match(argument)], overrides


def to_yaml(settings: config.Section) -> str:
    """The complete settings, in a form that `load_config` reads back to the same."""
    return yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _load(entry: str) -> Callable[..., Any]:
    module, function = entry.split(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(f"beats_ray.{module}"), function)
    return loaded


def _run_on_cluster(name: str, ray: config.RaySettings, job: Callable[[Console], list[tuple[str, str]]]) -> None:
    console = Console()
    try:
        console.stage("start Ray")
        with _load("launch:ray_cluster")(ray):
            submitted = submission_id()
            if submitted is not None:
                console.follow(JobStatus(submitted).tell, name)
            written = job(console)
        console.written(written)
    finally:
        console.close()


def _check_place(settings: Job, need: str) -> None:
    values = {}
    for name in need.removesuffix("?").split("|"):
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        values[name] = value
    if not any(values.values()) and not need.endswith("?"):
        choice = " or ".join(values)
        raise UserError(f"{choice}: missing; set it in the config file or as {next(iter(values))}=PATH")
    for name, value in values.items():
        if name == "data.path" and value:
            from beats_ray.data.manifest import read_manifest
            from beats_ray.data.storage import open_place

            read_manifest(open_place(value))
        elif isinstance(value, str):
            if value:
                _require_exists(name, value)
        else:  # several, in a list or by names
            for key, path in value.items() if isinstance(value, dict) else enumerate(value):
                _require_exists(f"{name}.{key}", path)


def _require_begun(settings: Job) -> None:
    from beats_ray.data.storage import open_place
    from beats_ray.stage import read_stage

    if not read_stage(open_place(settings.output)):
        raise UserError(
            f"--resume: output={settings.output} holds no run to go on with; check the path, or leave --resume out"
        )


def _require_exists(name: str, path: str) -> Any:
    from beats_ray.data.storage import existing_place

    return existing_place(name, path)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command line and returns its exit status; all output to the user happens here or in the job."""
    try:
        outcome = cli.main(arguments, prog_name="beats-ray", standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except click.ClickException as error:
        return _complain(error.format_message())
    except (KeyboardInterrupt, click.Abort):
        click.echo("beats-ray: interrupted", err=True)
        return 130
    except Exception as error:  # noqa: BLE001  # the outermost place: everything becomes an exit status here
        mistake = find_user_error(error)
        if mistake is not None:
            return _complain(str(mistake))
        click.echo(without_secrets("".join(traceback.format_exception(error))), err=True, nl=False)
        return 1


def without_secrets(text: str) -> str:
    """`text` without the values of the object store's keys, wherever an exception may have put them."""
    for name in SECRET_VARIABLES:
        secret = os.environ.get(name, "")
        if len(secret) >= 4:
            text = text.replace(secret, f"<{name}>")
    return text


def _complain(message: str) -> int:
    line = " ".join(without_secrets(message).split())
    click.echo(f"beats-ray: error: {line}", err=True)
    return 2


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise SystemExit(143)  # `ray job stop` and `kill` unwind everything, as Ctrl-C does


def run(arguments: list[str] | None = None) -> NoReturn:
    """The `beats-ray` script, and those of `jobs/`."""
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main(arguments))


for _name, _command in COMMANDS.items():
    _add(_name, _command)
