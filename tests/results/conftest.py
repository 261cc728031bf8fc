from tests.report.conftest import run_dir

__all__ = ["run_dir"]
