from setuptools import setup

setup(
    name="minicode",
    version="0.1.0",
    description="Codebook features: hidden states as short lists of codes, to read and to control",
    license="MIT",
    packages=["minicode", "minicode.runtime", "minicode.language", "minicode.study", "minicode.csrc"],
    package_dir={"minicode.csrc": "csrc"},  # the sources travel with the wheel, and are compiled at first use
    package_data={
        "minicode.language": ["*.txt"],
        "minicode.study": ["*.css", "*.html"],
        "minicode.csrc": ["*"],
    },
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "ninja", "numpy", "tqdm"],
    extras_require={"test": ["pytest"], "dev": ["pytest", "ruff"]},
)
