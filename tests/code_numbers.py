"""Sizes of the code that the project holds itself to: `python tests/code_numbers.py` prints them."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "improved_diffusion"
MAX_ENTRIES, MAX_MODULE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 22, 400, 40, 6


def entries() -> list[str]:
    """Modules and folders at the package's top level."""
    names = [path.stem if path.suffix == ".py" else path.name for path in PACKAGE.iterdir()]
    return sorted(name for name in names if not name.startswith("_"))


def floors() -> list[str]:
    """The layers that lint-imports holds, the highest first; needs Python 3.11."""
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    return next(c["layers"] for c in settings["contracts"] if c["type"] == "layers")


def long_modules() -> list[str]:
    sizes = {path: len(path.read_text().splitlines()) for path in sorted(PACKAGE.rglob("*.py"))}
    return [f"{_name(p)}: {n} lines" for p, n in sizes.items() if n > MAX_MODULE_LINES]


def large_functions() -> list[str]:
    """Functions with too many lines (decorators not counted) or parameters (self not counted)."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            kernel = any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)
            # A kernel takes every pointer and size by itself: its body alone is counted.
            start = node.body[0].lineno if kernel else node.lineno
            lines = (node.end_lineno or start) - start + 1
            args = ast.arguments([], [], None, [], [], None, []) if kernel else node.args
            names = [arg.arg for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs)]
            parameters = len([name for name in names if name not in ("self", "cls")])
            if lines > MAX_FUNCTION_LINES or parameters > MAX_PARAMETERS:
                where = f"{_name(path)}:{node.lineno} {node.name}"
                found.append(f"{where}: {lines} lines, {parameters} parameters")
    return found


def _name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def main() -> None:
    print(f"entries at the top level: {len(entries())} (at most {MAX_ENTRIES})")
    print(f"floors: {len(floors())}")
    for what, found in (
        (f"modules > {MAX_MODULE_LINES} lines", long_modules()),
        (
            f"functions > {MAX_FUNCTION_LINES} lines or {MAX_PARAMETERS} parameters",
            large_functions(),
        ),
    ):
        print(f"{what}: {len(found)}", *found, sep="\n  ")


if __name__ == "__main__":
    main()
