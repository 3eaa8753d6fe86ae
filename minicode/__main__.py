"""python -m minicode: the commands, and where to start."""

COMMANDS = {
    "train_fsm": "trains a transformer with codebooks on TokFSM, a machine whose truth is known",
    "train_text": "trains a language model with codebooks, on stories or on your own text",
    "sample": "samples from a run, and steers it by its codes",
    "interpret": "what the codes of a run stand for, and what they do when they are forced",
    "compare": "codebooks beside sparse autoencoders, k-means and neurons",
    "ablate": "what was tried, trained and measured, as tables",
    "bench": "times the search, and a training step around it",
    "topk": "says what the search runs on here, and builds it",
}
START = """
Start with the first: it takes about two minutes and says what comes next. Each has --help.
README.md shows what they print, tutorial.md explains it.\
"""


def main():
    print("minicode: codebook features. Its commands:\n")
    for name, what in COMMANDS.items():
        print(f"  python -m minicode.{name:10}  {what}")
    print(START)


if __name__ == "__main__":
    main()
