"""What pyproject.toml cannot say: one file is installed beside the package, not in it.

Releases of lm_eval up to 0.4.13 do not look for models of other packages, so that in the program
lm_eval someone else has to register ours; later ones find it by its entry point. Once the extra hf
asks for one of these, this file and `register` in programs/lm_eval.py go.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

AT_START = """\
import sys; any(word.rpartition("/")[2] in ("lm_eval", "lm-eval") for word in \
sys.orig_argv[-len(sys.argv):][:1]) and \
__import__("neighborlm.programs.lm_eval", fromlist="_").register()
"""
"""One line, which every Python of the environment runs when it starts. The word is the script, or
the module behind -m."""


class BuildWithStart(build_py):
    """Builds the package, and adds the file at the root of the wheel; an editable install is made
    from a wheel, too."""

    def run(self) -> None:
        super().run()
        install = self.get_finalized_command("install")
        root = install.install_lib if self.editable_mode else self.build_lib
        Path(root, "neighborlm_lm_eval.pth").write_text(AT_START)


setup(cmdclass={"build_py": BuildWithStart})
