"""Runs the shared tests without pytest, so that MicroPython can run them too.

    micropython tests/support/run_shared.py [folder or file ...]          (in the checkout)

Calls every `test_*` function of every `test_*.py` without arguments, prints the traceback of each failure and closes
with "N passed, N failed". Exit status 0: something ran and nothing failed.
"""

import gc
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

FOLDERS = ("tests/core", "tests/contracts", "tests/powercut")
SOURCE_ROOTS = ["agent", "hal", "tools", "tests"]


def files_in(place: str) -> "list[str]":
    """The paths of the test files in folder `place`, sorted; `place` itself where it is a file."""
    if place.endswith(".py"):
        return [place]
    names = [name for name in os.listdir(place) if name.startswith("test_") and name.endswith(".py")]
    return [place + "/" + name for name in sorted(names)]


def run_file(path: str) -> "tuple[int, int]":
    """Runs one test file; returns the counts of passed and failed functions, an import that fails being one."""
    folder, _, file_name = path.rpartition("/")
    name = file_name[:-3]
    sys.path.insert(0, folder)
    try:
        module = __import__(name)
    except Exception as error:
        report(path, error)
        return 0, 1
    finally:
        sys.path.remove(folder)
        sys.modules.pop(name, None)  # two folders may hold files of one name
    return run_module(path, module)


def run_module(path: str, module: "ModuleType") -> "tuple[int, int]":
    """Calls the test functions of `module` in the order of their names."""
    passed = failed = 0
    for name in sorted(dir(module)):
        test = getattr(module, name)
        if not name.startswith("test_") or not callable(test):
            continue
        try:
            test()
            passed += 1
        except Exception as error:
            failed += 1
            report(path + "::" + name, error)
        gc.collect()
    return passed, failed


def report(where: str, error: Exception) -> None:
    """Prints which test failed and its traceback."""
    print("FAILED " + where)
    if sys.implementation.name == "micropython":
        sys.print_exception(error)  # type: ignore[attr-defined]
    else:
        import traceback

        traceback.print_exception(error)


def main(arguments: "list[str]") -> int:
    """Runs the files and folders in `arguments`, or all shared tests."""
    sys.path[:0] = SOURCE_ROOTS
    passed = failed = 0
    for place in arguments or FOLDERS:
        for path in files_in(place):
            file_passed, file_failed = run_file(path)
            passed += file_passed
            failed += file_failed
            gc.collect()
    print(f"{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
