from setuptools import setup

setup(
    name="minicode",
    version="0.1.0",
    description="Codebook features: hidden states as short lists of codes, to read and to control",
    license="MIT",
    packages=[
        "minicode",
        "minicode.language",
        "minicode.study",
        "minicode.runtime",
        "minicode.csrc",  # the sources travel with the wheel, and are compiled at first use
    ],
    package_dir={"minicode.csrc": "csrc"},
    package_data={
        "minicode.language": ["*.txt"],
        "minicode.study": ["*.css", "*.html", "*.js"],
        "minicode.csrc": ["*"],
    },
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "ninja", "numpy", "tqdm"],
    extras_require={
        "hf": ["transformers>=4.56"],  # pretrained models: python -m minicode.train_text --model
        "test": ["pytest"],
        "dev": ["pytest", "ruff~=0.17.6"],
    },
)
