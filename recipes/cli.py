"""The `decant` command. Each command imports what it needs when it runs: `decant --help` answers at once."""

import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from distill.errors import GateFailed, UserError
from recipes.cli_parts import Bundle, Keys, Quiet, RequireSignature, collect_garbage, progress, sentences
from recipes.device_cli import app as device_app

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
app.add_typer(device_app, name="device")

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or the name of a shipped one, such as quickstart.")
]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="a.b=v", help="Override a setting; may be repeated. The value is YAML.")
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="The run folder. By default runs/<the recipe's name>.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")]


def main() -> None:
    """The entry point."""
    # Before torch is imported. Waiting threads that spin make small products ten times slower as soon as anything else wants a core
    # (a batch of 64 through a tiny ViT on 2 cores, one of them taken: 1,446 ms spinning, 128 ms passive).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows ? for ×, and no traceback
    gc.disable()  # thousands of modules are loaded now, none of it garbage: a quarter of the time of `decant check`
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe had enough, as in `decant schema | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version as installed

        typer.echo(f"decant {installed('decant-vision')}")
        raise typer.Exit


@app.callback()
def decant(
    version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Pour a large vision model into small ones that ship.

    Begin with `decant run quickstart`: it needs no data, no network and no GPU.

    Exit codes: 0 done, 1 a gate failed, 2 bad usage or recipe, 3 the machine lacks something; interrupted by Ctrl-C 130, SIGTERM 143,
    SIGHUP 129.
    """


@app.command()
def run(
    recipe: RecipeName,
    settings: Settings = [],  # noqa: B006  typer copies it
    until: Annotated[
        str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage or group of stages.")
    ] = None,
    out: Out = None,
    quiet: Quiet = False,
) -> None:
    """Do everything that the recipe asks for. Again: continues, and skips what is done."""
    with sentences() as crash:
        from recipes.loading import load_recipe
        from recipes.run import execute
        from recipes.schema import Recipe
        from recipes.stages import plan

        collect_garbage()
        loaded, text = load_recipe(recipe, settings, Recipe)
        folder = crash.folder = out or Path("runs") / loaded.name
        with results(folder, until):
            execute(folder, plan(loaded, folder), progress(quiet), recipe=loaded.name, text=text, until=until)


@app.command()
def check(
    recipe: RecipeName,
    settings: Settings = [],  # noqa: B006
    out: Out = None,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Over how many devices the memory is estimated.")] = 1,
) -> None:
    """Validate a recipe and print its plan: models, sizes, cost, and which stages would run. Does nothing."""
    with sentences():
        from rich.console import Console

        from recipes.describe import describe
        from recipes.loading import load_recipe
        from recipes.schema import Recipe

        loaded, _ = load_recipe(recipe, settings, Recipe)
        Console().print(describe(loaded, out or Path("runs") / loaded.name, processes))


@app.command("eval")
def evaluate(folder: RunFolder, quiet: Quiet = False) -> None:
    """Evaluate a finished run again, and renew what depends on it."""
    again(("parity", "evaluate"), folder, quiet)


@app.command()
def export(folder: RunFolder, quiet: Quiet = False) -> None:
    """Export, quantize and compile a finished run's students again, and renew what depends on it."""
    again(("export",), folder, quiet)


@app.command()
def bench(
    targets: Annotated[
        list[Path],
        typer.Argument(
            metavar="TARGET...",
            help="An .onnx, an OpenVINO .xml, an engine, a bundle (.tar.gz), the folder of an artifact or a model; or one RUN alone.",
        ),
    ],
    batch: Annotated[
        list[int],
        typer.Option("--batch", min=1, help="Examples a call; may be repeated. By default 1, or what a file is fixed at."),
    ] = [],  # noqa: B006
    resolution: Annotated[
        int | None,
        typer.Option("--resolution", min=1, help="Side of pictures in pixels where a file leaves it open. By default 224."),
    ] = None,
    threads: Annotated[
        list[int],
        typer.Option("--threads", min=1, help="Of the CPU; may be repeated. By default all that this process may use."),
    ] = [],  # noqa: B006
    runtime: Annotated[
        list[str], typer.Option("--runtime", help="What runs a plain ONNX file: onnxruntime or openvino; may be repeated.")
    ] = [],  # noqa: B006
    seconds: Annotated[
        float | None, typer.Option("--seconds", help="Timed seconds of each file and batch. By default 2.")
    ] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Turns that the files take. By default 20.")] = None,
    versus: Annotated[
        Path | None, typer.Option("--versus", metavar="TARGET", help="What the others are compared with. By default the first.")
    ] = None,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="On a GPU: time the network alone as a CUDA graph.")] = False,
    as_json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every row and the machine to a file.")
    ] = None,
    as_csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write every row as a table.")] = None,
    quiet: Quiet = False,
) -> None:
    """Time files against each other, interleaved in one run; or measure a finished run's artifacts again.

    Each file is opened five times, and everything takes turns. FASTER or SLOWER is said only when the whole 95 % interval of the ratio,
    widened by what a file shows against itself, lies on one side. A run is measured with its recipe's settings, without options.
    """
    asked: dict[str, Any] = {
        "--batch": batch,
        "--resolution": resolution,
        "--threads": threads,
        "--runtime": runtime,
        "--seconds": seconds,
    }
    asked |= {"--rounds": rounds, "--versus": versus, "--cuda-graph": cuda_graph, "--json": as_json, "--csv": as_csv}
    with sentences():
        from recipes.bench import bench_files, run_folder

        collect_garbage()
        folder = run_folder(targets, [name for name, value in asked.items() if value])
        if folder is None:
            bench_files(
                targets,
                batches=batch,
                resolution=resolution,
                threads=threads,
                runtimes=runtime,
                seconds=seconds,
                rounds=rounds,
                versus=versus,
                cuda_graph=cuda_graph,
                as_json=as_json,
                as_csv=as_csv,
                progress=progress(quiet),
            )
    if folder is not None:
        again(("benchmark",), folder, quiet)


@app.command()
def report(folder: RunFolder, quiet: Quiet = False) -> None:
    """Write a finished run's report again."""
    again(("report",), folder, quiet)


@app.command()
def bundle(folder: RunFolder, quiet: Quiet = False) -> None:
    """Pack a finished run's bundles again."""
    again(("bundle",), folder, quiet)


@app.command()
def keygen(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where the two files go. By default here.")] = Path(),
) -> None:
    """Make a pair of keys to sign bundles with: decant-signing.pem, which only you may have, and decant-signing.pub.pem.

    The private file is encrypted by the passphrase in DECANT_KEY_PASSPHRASE, or by the one that you are asked for. Overwrites nothing.
    """
    with sentences():
        from recipes.signing import keygen as make

        for line in make(out):
            typer.echo(line)


@app.command()
def sign(
    bundle: Bundle,
    key: Annotated[Path, typer.Option("--key", metavar="FILE", help="The private key, of `decant keygen` or of openssl.")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="The signed bundle. By default in place of the other.")
    ] = None,
) -> None:
    """Put your signature into a bundle, beside those that are there. Verifies it first; nothing else in it changes."""
    with sentences():
        from recipes.signing import sign as sign_it

        typer.echo(sign_it(bundle, key, out))


@app.command()
def verify(
    bundle: Bundle,
    key: Keys = [],  # noqa: B006
    require_signature: RequireSignature = False,
    contents: Annotated[bool, typer.Option("--contents", help="Also say what takes the room in it.")] = False,
) -> None:
    """Check a bundle's archive, manifest, signatures and hashes without running or unpacking anything.

    With --key, exit code 1 unless one of these keys signed it. Without, a signature shows no more than that nothing was changed since.
    """
    with sentences():
        from recipes.signing import verify as check_bundle

        for line in check_bundle(bundle, key, require_signature, contents):
            typer.echo(line)


@app.command()
def layout(
    bundle: Bundle,
    to: Annotated[str, typer.Option("--to", metavar="LAYOUT", help="triton, oci, docker, jetson or windows-rtx.")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="A new folder for it.")],
    key: Keys = [],  # noqa: B006
    require_signature: RequireSignature = False,
) -> None:
    """Lay a bundle out for others: a Triton repository, an OCI artifact, a Docker context, a folder that installs on a Jetson or RTX PC.

    Verifies it first and runs nothing of it. The same bundle gives the same bytes.
    """
    with sentences():
        from recipes.layout import layout as lay_out

        for line in lay_out(bundle, to, out, key, require_signature):
            typer.echo(line)


@app.command()
def selftest(bundle: Bundle, key: Keys = [], require_signature: RequireSignature = False) -> None:  # noqa: B006
    """Verify a bundle, then run its models on its golden images and compare. It runs code of the bundle: --key says whose it must be."""
    with sentences():
        from distill.progress import Progress
        from export.bundling.selftest import selftest as test_bundle
        from recipes.signing import trust_in

        test_bundle(bundle, Progress("plain", stream=sys.stdout), trust=trust_in(key, require_signature))


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(metavar="MODEL", help="A model folder, such as runs/quickstart/students/small.")],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="official, timm, transformers or mmpretrain.")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="A .pth or .safetensors file; for transformers a folder.")],
    heads: Annotated[bool, typer.Option("--heads", help="With official: a full teacher checkpoint, heads included.")] = False,
) -> None:
    """Write a model's weights in the format of DINOv2's own files, timm, transformers or MMPreTrain."""
    with sentences():
        from recipes.convert import convert as write

        for line in write(folder, to, out, heads):
            typer.echo(line)


@app.command()
def lint(
    files: Annotated[list[Path], typer.Argument(metavar="MODEL.onnx...", help="ONNX files, of decant or of anyone else.")],
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="fp32, fp16, bf16, int8, fp8, w8 or w4. By default what the file's name claims."),
    ] = None,
    reader: Annotated[
        str, typer.Option("--for", metavar="RUNTIME", help="Who runs it: tensorrt (RTX too), onnxruntime or openvino.")
    ] = "tensorrt",
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    sarif: Annotated[
        Path | None, typer.Option("--sarif", metavar="FILE", help="Write SARIF 2.1.0 for code review; - prints it.")
    ] = None,
) -> None:
    """Say what in an ONNX file TensorRT refuses, runs slowly or computes wrongly, why, and what cures it.

    Runs nothing of the file. Exit code 1 when there is an error, 0 with warnings and notes only, 2 when a file cannot be read.
    """
    with sentences():
        from recipes.lint import check_files, show

        findings = check_files(files, precision, reader)
        show(findings, as_json, sarif)
        if any(f.severity == "error" for found in findings.values() for f in found):
            raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="RUN_A", help="The run to compare with: a folder, its report.json or rows.jsonl.")
    ],
    b: Annotated[Path, typer.Argument(metavar="RUN_B", help="The run that is judged.")],
    gates: Annotated[
        list[str],
        typer.Option("--gate", metavar="'knn>=-0.3'", help="METRIC[@SUBJECT[/TARGET]] >= or <= B minus A; may be repeated."),
    ] = [],  # noqa: B006
    strict: Annotated[bool, typer.Option("--strict", help="A gate holds only if the whole interval does.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Show every number, not only those that changed.")] = False,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="For a pull request; - prints it.")
    ] = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="JUnit XML for CI; - prints it.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Everything as JSON; - prints it.")] = None,
) -> None:
    """Say what changed between two runs, with intervals and verdicts. Exit code 1 when a gate fails.

    Accuracies on the same test images are compared in pairs; times only where the machine is the same.
    """
    with sentences():
        from recipes.compare import compare as compare_runs

        compare_runs(a, b, gates, strict, everything, markdown, junit, as_json)


@app.command()
def demo(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN|BUNDLE|ARTIFACT...", help="A run's folder, a bundle, or folders of artifacts.")
    ],
    images: Annotated[
        Path | None, typer.Option("--images", metavar="FOLDER", help="Images to search in, indexed when first asked for.")
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option("--index", metavar="DIR", help="Where the index is kept. By default in the run or beside the bundle."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to serve at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option("--port", min=1, max=65535, help="By default the first free one from 7860.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    check: Annotated[bool, typer.Option("--check", help="Try every view once, print a line a model, and end.")] = False,
) -> None:
    """Show what the features see on a page: components, similarity, masks, similar images, and two artifacts side by side."""
    with sentences():
        from recipes.demo import show

        show(paths, images, index, host, port, browser, check)


@app.command()
def doctor() -> None:
    """Say what this machine has, and what each missing thing would give."""
    with sentences():
        from rich.console import Console

        from recipes.doctor import examine, table

        findings = examine(Path())
        Console().print(table(findings))
        if any(f.needed and not f.works for f in findings):
            raise typer.Exit(3)


@app.command()
def schema(
    report: Annotated[bool, typer.Option("--report", help="Print the schema of report.json instead.")] = False,
) -> None:
    """Print the JSON schema of a recipe, for editors that complete and check YAML."""
    with sentences():
        import json

        if report:
            from export.reporting.report_schema import json_schema

            typer.echo(json.dumps(json_schema(), indent=2))
            return
        from recipes.schema import Recipe

        typer.echo(json.dumps(Recipe.model_json_schema(), indent=2))


def again(groups: tuple[str, ...], folder: Path, quiet: bool) -> None:
    """Do groups of stages again on a finished run, with the settings that the run keeps in its recipe.yaml."""
    with sentences() as crash:
        from recipes.decide import decide
        from recipes.loading import load_recipe
        from recipes.run import execute, run_info
        from recipes.schema import Recipe
        from recipes.stages import plan

        collect_garbage()
        info = run_info(folder)
        crash.folder = folder
        if not (folder / "recipe.yaml").exists():
            raise UserError(f"{folder} has no recipe.yaml. `decant run {info['recipe']} --out {folder}` writes it again.")
        loaded, text = load_recipe(str(folder / "recipe.yaml"), [], Recipe)
        stages = plan(loaded, folder)
        names = [s.name for s in stages if s.name.split("/")[0] in groups]
        for decision in decide(folder, stages):
            if decision.stage.name in names:
                break
            if decision.action != "skip":
                first = f"its stage {decision.stage.name} is not done ({decision.why})"
                raise UserError(f"{folder} is not finished: {first}. `decant run {folder}/recipe.yaml --out {folder}` does it.")
        with results(folder):
            execute(folder, stages, progress(quiet), recipe=info["recipe"], text=text, force=names)


@contextmanager
def results(folder: Path, until: str | None = None) -> Iterator[None]:
    """What a run ends with, also when a gate failed: the table, the report's path, the next command."""
    try:
        yield
    except GateFailed:
        show_results(folder, until)
        raise
    show_results(folder, until)


def show_results(folder: Path, until: str | None) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    if until is not None:
        typer.echo(f"Stopped after {until}, as asked. The same command without --until continues.")
        return
    from rich.console import Console

    from distill.rows import read_rows
    from export.report import console_table

    Console().print(console_table(read_rows(folder / "rows.jsonl")))
    if (page := folder / "report" / "index.html").exists():
        typer.echo(f"Report: {page}")
    # After a failed gate a bundle that lies there is of an earlier version.
    bundles = [] if sys.exc_info()[0] else sorted((folder / "bundles").rglob("*.tar.gz"))
    typer.echo(f"Next:   decant {f'selftest {bundles[0]}' if bundles else f'report {folder}'}")


if __name__ == "__main__":  # accelerate launch -m recipes.cli run ...
    main()
