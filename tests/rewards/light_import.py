"""Source of a prelude for child processes: `fura_rl.rewards` without what `fura_rl` itself imports (torch)."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PRELUDE = f"""
import importlib.util, sys, types
package = types.ModuleType("fura_rl")
package.__path__ = [{str(ROOT / "fura_rl")!r}]
sys.modules["fura_rl"] = package
spec = importlib.util.spec_from_file_location(
    "fura_rl.rewards", {str(ROOT / "rewards" / "__init__.py")!r},
    submodule_search_locations=[{str(ROOT / "rewards")!r}],
)
sys.modules["fura_rl.rewards"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fura_rl.rewards"])
"""
