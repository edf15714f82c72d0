"""The public names, and what importing the package costs."""

import subprocess
import sys

import qgraft


def test_all_is_sorted_and_complete():
    assert qgraft.__all__ == sorted(qgraft.__all__)
    assert set(qgraft._HOMES) < set(qgraft.__all__)
    for name in qgraft.__all__:
        assert getattr(qgraft, name) is not None
    assert set(qgraft.__all__) <= set(dir(qgraft))


def test_there_are_few_names_and_each_is_documented():
    assert 15 <= len(qgraft.__all__) <= 35
    undocumented = [name for name in qgraft.__all__ if not (getattr(qgraft, name).__doc__ or "").strip()]
    assert undocumented == []


def test_an_unknown_name_is_an_attribute_error():
    assert not hasattr(qgraft, "nothing_of_that_name")


def loaded_after(statement: str) -> set[str]:
    """Names of modules, dotted ones too."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_qgraft_loads_no_library():
    heavy = {
        "torch",
        "transformers",
        "datasets",
        "matplotlib",
        "triton",
        "fastapi",
        "accelerate",
        "gguf",
        "numpy",
        "rich",
    }
    assert loaded_after("import qgraft") & heavy == set()


def test_loading_a_model_needs_neither_datasets_nor_matplotlib():
    """Nor our Triton kernels. triton itself, where it is installed, comes with torch._dynamo, and this with transformers."""
    loaded = loaded_after("import qgraft; qgraft.load; qgraft.attach_lora; qgraft.save_adapter")
    ours = {f"qgraft.kernels.{name}" for name in ("triton_blocks", "triton_rows")}
    assert loaded & {"datasets", "matplotlib", "fastapi", *ours} == set()


def test_help_loads_no_torch():
    statement = "from qgraft.cli.main import main; main(['--help']); main(['pull', '--version']) if 0 else None"
    assert loaded_after(statement) & {"torch", "transformers"} == set()
