from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_a_recipe_error_imports_neither_torch_nor_transformers_nor_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {lerning_rate: 1, learning_rate: x}\n", encoding="utf-8")
    code = (
        "import sys\n"
        "from gptcli.errors import RecipeError\n"
        "from gptcli.recipe.availability import check_available\n"
        "from gptcli.recipe.load import load_recipe\n"
        "for overrides in ([], ['train.lerning_rate=null']):\n"
        "    try:\n"
        "        load_recipe('r.yaml', overrides)\n"
        "    except RecipeError as error:\n"
        "        print(error.what)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'typer', 'rich', 'tokenizers', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["unknown key train.lerning_rate"] * 2 + ["[]"]
