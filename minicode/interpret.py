"""python -m minicode.interpret: what the codes of a run stand for, and what they do when forced.

python -m minicode.interpret                       every measure: tables and report.html
python -m minicode.interpret --search 'New (York)' the codes that fire where a pattern ends
python -m minicode.interpret --code mlp.1.527      where a code fires, in context
python -m minicode.interpret --compare runs/other  do the codes of another run agree?
python -m minicode.interpret --elsewhere FILE ...  do the stories' topics keep their codes there?
python -m minicode.interpret --steer words:king,queen/crown,throne words:war,sword/army,battle
                                                   every measure; steering of these topics too
python -m minicode.interpret --picture FILE.svg    a sequence with its codes, and others forced
"""

import json
from pathlib import Path

from minicode.language.elsewhere import elsewhere
from minicode.language.topics import BUDGET, find_topic
from minicode.notation import Code
from minicode.runtime.arguments import check_range
from minicode.runtime.options import Parser
from minicode.runtime.runs import latest_run, load_run
from minicode.study.demonstration import note_unlearnt
from minicode.study.detectors import held_out, record_codes
from minicode.study.lookup import compare, look_up, search
from minicode.study.picture import picture
from minicode.study.study import study


def main(argv=None):
    """Prints what is asked for, and returns it."""
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        run = load_run(args.run or latest_run())
        result, text = answer(run, args)
    note_unlearnt(run)
    print(json.dumps(result) if args.json else text)
    return result


def answer(run, args):
    """What the flags ask of a run: a result, and that as text."""
    run.sites()
    for name in ("precision", "recall", "budget"):
        check_range(name, getattr(args, name), least=0, below=1e38)
    topics = steered(run, args.steer)
    tokens, kinds = held_out(run)
    recording = record_codes(run.model, tokens)
    if args.search is not None:
        return search(run, recording, args.search, args.precision, args.recall)
    if args.code:
        return look_up(run, recording, kinds, Code.parse(args.code, run.model))
    if args.compare:
        return compare(run, recording, load_run(args.compare))
    if args.elsewhere is not None:
        return elsewhere(run, recording, kinds, args.elsewhere)
    if args.picture:
        return picture(run, recording, kinds, args.picture)
    return study(run, recording, kinds, topics, args.budget, args.figures)


def steered(run, asked):
    """The topics to steer to: those asked for; or those of the stories, if there is room."""
    roomy = run.config.block_size >= 16
    if asked and not roomy:
        raise ValueError(f"--steer wants a block_size of 16 or more, not {run.config.block_size}")
    names = asked or [f"topic:{name}" for name in run.data.topics if roomy]
    topics = [find_topic(run, name) for name in names]
    if len({topic.title for topic in topics}) < len(topics):
        raise ValueError("two topics begin with the same word, by which the table names them")
    return topics


def make_parser():
    parser = Parser("interpret", __doc__)
    add = parser.add_argument
    one_of = parser.add_mutually_exclusive_group().add_argument
    add("--run", type=Path, metavar="FOLDER", help="the run (default: the newest in runs/)")
    one_of(
        "--search", metavar="REGEX", help="the codes that fire where it, or its first bracket, ends"
    )
    add("--precision", type=float, default=0.5, help="the least for --search (default: 0.5)")
    add("--recall", type=float, default=0.1, help="the least for --search (default: 0.1)")
    one_of("--code", help="where this code fires")
    one_of("--compare", type=Path, metavar="FOLDER", help="another run on the same data")
    text = "of a run on stories: other text, besides stories told in another way"
    one_of("--elsewhere", nargs="*", metavar="FILE", help=text)
    one_of("--picture", type=Path, metavar="FILE", help="of a run on TokFSM, as SVG")
    lists = "words that codes are chosen by, and after a slash those that are counted"
    one_of(
        "--steer", nargs="+", metavar="TOPIC", help=f"topics of your own text, as above: {lists}"
    )
    cost = "nats a token that a topic's codes may cost, to the dense model (default: %(default)s)"
    add("--budget", type=float, default=BUDGET, help=cost)
    add("--figures", type=Path, metavar="FOLDER", help="write the figures there too, as SVG")
    add("--json", action="store_true", help="print the result as JSON")
    return parser


if __name__ == "__main__":
    main()
