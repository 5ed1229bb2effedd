"""Install with `pip install -e .`; the extras are described in README.md."""

from setuptools import find_packages, setup

TF = [
    # tensorflow-gan needs tf.estimator, which is gone from TensorFlow 2.16 on.
    "tensorflow-cpu==2.15.1; python_version < '3.12'",
    "tensorflow-gan==2.1.0; python_version < '3.12'",
    "tensorflow-hub==0.15.0; python_version < '3.12'",
    "tensorflow-probability==0.23.0; python_version < '3.12'",
    "setuptools>=77.0.3,<81; python_version < '3.12'",
    # The newest that allows the protobuf 4 of TensorFlow 2.15.
    "wandb<=0.28.0; python_version < '3.12'",
]
MPI = ["mpich>=4.3,<6"]
VIDEO = ["av>=12"]
MAZES = ["memory-maze==1.0.3", "dm_control==1.0.31", "mujoco==3.3.3", "gym==0.26.2"]
# Where torch is one for CPUs, it brings no Triton, which interprets the kernels in tests.
TRITON = ["triton; sys_platform == 'linux' and platform_machine == 'x86_64'"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "html5lib>=1.1",
    "playwright>=1.40",
]
CHECKS = ["ruff>=0.6", "mypy>=1.11", "import-linter>=2.1"]

setup(
    name="improved-diffusion",
    version="0.2.0",
    description="Flexible diffusion modeling of long videos",
    license="MIT",
    packages=find_packages(include=["improved_diffusion", "improved_diffusion.*"]),
    package_data={
        "improved_diffusion.evaluation.report": ["page.html", "page.css", "page.js"],
        "improved_diffusion.study": ["presets/*.json"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.5",
        "torchvision>=0.20",
        "numpy>=1.26.4,<3",
        "scipy",
        "mpi4py>=4.1,<5",
        "blobfile>=3.1,<4",
        "wandb>=0.17",
        "imageio>=2.34,<3",
        "imageio-ffmpeg>=0.5.1",
        "pillow>=10.1",
        "lpips==0.1.4",
        "scikit-image>=0.24",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "tqdm",
        "filelock",
    ],
    extras_require={
        "tf": TF,
        "mpi": MPI,
        "video": VIDEO,
        "mazes": MAZES,
        "test": TEST + CHECKS + MPI + VIDEO + TRITON,
    },
)
