"""The house rules: who may import whom, what importing does, and the traps of a root that is itself the package."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("nodes", "samplers", "trainer")
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths", "nodes", "server"}
TRAINING = {"accelerate", "diffusers", "peft", "transformers"}
# The rooms of trainer/, from the top down: a room imports from rooms on lower floors only (docs/architecture.md).
FLOORS = (
    ("__main__",),
    ("api", "cli"),
    ("bench", "demo", "studies"),
    ("training",),
    ("reporting",),
    ("efficiency", "evaluation", "inference", "sharing"),
    ("data", "lora"),
    ("comfy", "config", "families"),
    ("objectives", "pictures", "system", "tiny"),
)
LOOSE_FILES = 4  # of trainer/ beside its rooms and its __init__.py
TEMPLATE_FOLDERS = {"example_workflows", "example", "examples", "workflow", "workflows"}


def sources(*folders: str) -> list[Path]:
    found = [ROOT / "__init__.py"] if "." in folders else []
    return found + [p for folder in folders if folder != "." for p in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module a file imports, anywhere in it; those of the pack as "phased_consistency.<layer>..."."""
    package = ("phased_consistency", *path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, name.name]) for name in node.names)


def pack_layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "phased_consistency" and len(parts) > 1 else None


def run_python(code: str, cwd: Path, *folders: Path) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter, with folders on its path and cwd away from the repository."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("layer", "may_import", "never"),
    [
        ("samplers", {"samplers"}, HOST | TRAINING),
        ("trainer", {"samplers", "trainer"}, HOST),
        ("nodes", {"samplers", "nodes"}, TRAINING - {"transformers"}),  # which the host requires
    ],
)
def test_imports_go_one_way(layer, may_import, never):
    for path in sources(layer):
        for module in imports(path):
            assert pack_layer(module) in {None} | may_import, f"{path.name} imports {module}"
            assert module.split(".")[0] not in never, f"{path.name} imports {module}"


def test_the_scheduler_for_diffusers_needs_nothing_of_the_trainer():
    modules = set(imports(ROOT / "trainer" / "inference" / "scheduler.py"))
    assert {pack_layer(module) for module in modules} == {None, "samplers"}
    assert TRAINING & {module.split(".")[0] for module in modules} == {"diffusers"}


def room_of(module: str) -> str | None:
    """The room of trainer/ that a module stands in, by its folder or its file; None for what is not of trainer/."""
    parts = module.split(".")
    return parts[2] if parts[:2] == ["phased_consistency", "trainer"] and len(parts) > 2 else None


def test_no_arrow_goes_up():
    """A room knows what stands on lower floors, and nothing of its neighbours or of those above."""
    floor = {room: n for n, rooms in enumerate(FLOORS) for room in rooms}
    for path in sources("trainer"):
        room = room_of(".".join(("phased_consistency", *path.relative_to(ROOT).with_suffix("").parts)))
        if room == "__init__":
            continue
        assert room in floor, f"trainer/{room} is on no floor: add it to FLOORS and to docs/architecture.md"
        for other in {room_of(module) for module in imports(path)} - {None, room}:
            assert floor[other] > floor[room], (
                f"{path.relative_to(ROOT)} imports {other}, which is no floor below {room}"
            )


def test_the_rooms_are_what_one_sees_in_trainer():
    loose = {path.name for path in (ROOT / "trainer").glob("*.py")} - {"__init__.py"}
    assert len(loose) <= LOOSE_FILES, loose


@pytest.mark.parametrize("layer", LAYERS)
def test_no_file_imports_itself_in_a_circle(layer):
    graph: dict[str, set[str]] = {}
    names = {".".join(("phased_consistency", *p.relative_to(ROOT).with_suffix("").parts)): p for p in sources(layer)}
    for name, path in names.items():
        modules = {module if module in names else module.rpartition(".")[0] for module in imports(path)}
        graph[name] = modules & names.keys() - {name}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"these import each other: {sorted(graph)}"


def test_samplers_need_little():
    allowed = {"torch", "safetensors", "phased_consistency"} | sys.stdlib_module_names
    for path in sources("samplers"):
        assert {module.split(".")[0] for module in imports(path)} <= allowed, path.name


def test_the_packages_list_is_complete():
    """A folder missing from it works here, and is missing from every installed copy."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in sources(".", *LAYERS)}
    assert sorted(listed) == sorted(".".join(("phased_consistency", *folder.parts)) for folder in folders)


def test_every_data_file_is_packaged():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    folders = {package: ROOT.joinpath(*package.split(".")[1:]) for package in data}
    packaged = {
        path for package, patterns in data.items() for pattern in patterns for path in folders[package].glob(pattern)
    }
    for layer in LAYERS:
        for path in (ROOT / layer).rglob("*"):
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert path in packaged, (
                    f"{path.relative_to(ROOT)} matches no pattern of [tool.setuptools.package-data]"
                )


@pytest.mark.parametrize("command", [["-m", "pytest"], ["-c", "import sys, pytest; sys.exit(pytest.console_main())"]])
def test_the_root_package_does_not_break_collection(command):
    """`python -m pytest` puts the root on sys.path, plain `pytest` does not; neither may trip on its __init__.py."""
    collect = ["--collect-only", "-q", "-p", "no:cacheprovider", "tests/house/test_layout.py"]
    run = subprocess.run([sys.executable, *command, *collect], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_the_root_package_does_not_break_collection" in run.stdout


def test_the_root_is_not_on_the_path():
    """Else `import nodes`, the host's own included, would find our folder."""
    assert ROOT not in {Path(entry or os.curdir).resolve() for entry in sys.path}
    spec = importlib.util.find_spec("nodes")
    assert spec is None or ROOT not in Path(spec.origin or os.devnull).resolve().parents


def test_importing_does_no_work(tmp_path):
    """Outside the host: no nodes, no heavy library, no file but Python's own, no network, no process."""
    run = run_python(
        """
import sys, json
events = []
sys.addaudithook(lambda event, args: events.append([event, str(args[0]) if args else ""]))
import phased_consistency
seen = [e for e in events if e[0].startswith(("socket.", "subprocess.", "os.system", "urllib."))]
seen += [e for e in events if e[0] == "open" and not e[1].endswith((".py", ".pyc", ".pth"))]
print(json.dumps([seen, [m for m in ("comfy", "torch", "diffusers", "phased_consistency.nodes") if m in sys.modules]]))
""",
        tmp_path,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [[], []]


def test_a_folder_called_comfy_is_not_the_host(tmp_path):
    """comfy-cli makes one in the home, from where `python -m phased_consistency.trainer` may be started."""
    (tmp_path / "comfy").mkdir()
    run = run_python(
        "import sys, comfy, phased_consistency as p; print(p.__name__ + '.nodes' in sys.modules)", tmp_path
    )
    assert (run.stderr, run.stdout) == ("", "False\n")


def test_samplers_import_no_training_library(tmp_path):
    code = f"import sys, phased_consistency.samplers; print([m for m in {sorted(TRAINING)} if m in sys.modules])"
    assert run_python(code, tmp_path).stdout.strip() == "[]"


# Loads a folder as the host does: by path, under a name made of that path.
LOAD = """
import importlib.util, sys
name = {folder!r}.replace(".", "_x_")
spec = importlib.util.spec_from_file_location(name, {folder!r} + "/__init__.py")
sys.modules[name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(getattr(module, "comfy_entrypoint", None), module.WEB_DIRECTORY)
"""


@pytest.fixture
def pack(tmp_path):
    """Make a pack folder with our root file, the given nodes/__init__.py and our samplers, and a stand-in comfy_api."""

    def make(nodes: str) -> Path:
        folder = tmp_path / "custom_nodes" / "Phased-Consistency v1.2 (mine)"
        (folder / "nodes").mkdir(parents=True)
        (folder / "__init__.py").write_text((ROOT / "__init__.py").read_text(encoding="utf-8"), encoding="utf-8")
        (folder / "nodes" / "__init__.py").write_text(nodes, encoding="utf-8")
        (folder / "samplers").mkdir()
        for path in sources("samplers"):
            (folder / "samplers" / path.name).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        (tmp_path / "host" / "comfy_api").mkdir(parents=True)
        (tmp_path / "host" / "comfy_api" / "__init__.py").touch()
        return folder

    return make


def test_any_folder_name_loads_in_the_host(pack, tmp_path):
    code = "import comfy_api\nfrom ..samplers import PhaseGrid\ncomfy_entrypoint = PhaseGrid(40, 4).plan().ticks\n"
    folder = pack(code)
    run = run_python(LOAD.format(folder=str(folder)), tmp_path, tmp_path / "host")
    assert run.stdout.strip() == "(1000, 750, 500, 250, 0) ./nodes/web", run.stderr


def test_without_the_host_the_nodes_stay_out(pack, tmp_path):
    folder = pack("raise RuntimeError('nodes were imported')\n")
    run = run_python(LOAD.format(folder=str(folder)), tmp_path)
    assert run.stdout.strip() == "None ./nodes/web", run.stderr


def test_a_broken_import_inside_nodes_is_not_hidden(pack, tmp_path):
    folder = pack("import a_module_that_nobody_has\n")
    run = run_python(LOAD.format(folder=str(folder)), tmp_path, tmp_path / "host")
    assert run.returncode != 0 and "No module named 'a_module_that_nobody_has'" in run.stderr


def test_one_entry_point():
    """The host takes V1 mappings or the V3 entry point, and ignores the second without a word."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    names = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "comfy_entrypoint" in names and "NODE_CLASS_MAPPINGS" not in names


def test_torch_is_never_a_requirement():
    """ComfyUI-Manager installs requirements.txt, over the torch that the user's GPU needs."""
    for path in ROOT.glob("requirements*.txt"):
        assert "torch" not in path.read_text(encoding="utf-8"), path.name


def test_workflows_are_what_the_template_browser_reads():
    """It lists every .json at the top of the one folder it looks at, with the .jpg of the same name."""
    folders = [name for name in TEMPLATE_FOLDERS if (ROOT / name).is_dir()]
    assert folders == ["workflows"]
    files = sorted((ROOT / "workflows").iterdir())
    assert {path.suffix for path in files} <= {".json", ".jpg"}
    for path in files:
        if path.suffix == ".json":
            graph = json.loads(path.read_text(encoding="utf-8"))
            assert {"nodes", "links", "version"} <= graph.keys(), f"{path.name} is not in the UI format"
            assert path.with_suffix(".jpg") in files, f"{path.name} has no thumbnail"


def test_files_stay_readable():
    long = {
        path.name: n
        for path in sources(".", *LAYERS, "tests")
        if (n := len(path.read_text("utf-8").splitlines())) > 700
    }
    assert not long


def test_nothing_in_a_file_can_run_as_code():
    """No unpickling and no eval, so that no LoRA, checkpoint or state file can carry a program."""
    forbidden = {"eval", "exec", "torch.load", "pickle.load", "pickle.loads", "pickle.Unpickler"}
    for path in sources(".", *LAYERS, "tests"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, f"{path.name}:{node.lineno}"
