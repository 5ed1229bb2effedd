"""Convert the release of GQN-Mazes: python datasets/mazes.py --source FOLDER"""

from improved_diffusion.data.dataset_conversion import run
from improved_diffusion.script_util import run_main

if __name__ == "__main__":
    run_main(lambda: run("mazes_cwvae"))
