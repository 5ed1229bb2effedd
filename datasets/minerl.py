"""Convert the release of MineRL-Navigate: python datasets/minerl.py --source FOLDER"""

from improved_diffusion.data.dataset_conversion import run
from improved_diffusion.script_util import run_main

if __name__ == "__main__":
    run_main(lambda: run("minerl"))
