"""Compare samplers at few network calls: how far they end from the solution with very many.

Prints a table of root mean square errors, in grey levels of 255, over the first inference step of the
first batch of test videos.
"""

import argparse

from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.script_util import add_arguments, config_from_args, run_main
from improved_diffusion.study.options import SolverConfig

# Options of sampling that mean nothing here, or whose values are compared.
NOT_FOR_COMPARING = (
    "num_samples sample_idx eval_dir use_ddim sampler eta timestep_respacing spacing optimal status "
    "just_visualise"
).split()

EPILOG = """\
examples:
  python scripts/video_compare_solvers.py checkpoints/pretrained/bouncy_balls/ema_0.99_latest.pt \\
    --inference_mode autoreg --obs_length 4 --step_size 4 --subset_size 2
  python scripts/video_compare_solvers.py checkpoints/ID/ema_0.9999_latest.pt --inference_mode autoreg \\
    --step_size 10 --subset_size 2 --reference_calls 200
"""


def create_argparser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG)
    add_arguments(parser, SampleConfig, SolverConfig, leave_out=NOT_FOR_COMPARING)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = create_argparser().parse_args(argv)
    sampling, config = config_from_args(SampleConfig, args), config_from_args(SolverConfig, args)
    from improved_diffusion.study.solver_errors import solver_errors

    print(solver_errors(sampling, config))


if __name__ == "__main__":
    run_main(main)
