"""How well `octant data clean` finds what is planted, what MinHash does around its threshold, and how fast it is.

    python benchmarks/cleaning.py [FILE.jsonl …] [--seeds 5] [--markdown F]

The planted corpus (`tests/kit/planted.py`) has twenty cases of each rule per seed, among clean documents and
decoys that look like cases.  It was written together with the rules, so its figures say that the rules do what they
claim, not how they do on the web; for that read `report.md` of a run on your own data.

Boilerplate held out: four lists of lines.  The first was written down after the rules for phrases and patterns, and
had been read when the rules `interface` were made; those were tuned on the second; the others were written down
last, of other kinds of pages and of apps, and nothing was changed for them: what to expect where nobody thought of it.

Near duplicates: pairs of texts of 300 words whose true Jaccard similarity of shingles is known, and the share of pairs
that were called duplicates at a threshold of 0.8.

Speed: processor seconds of all processes per megabyte, the rules as built in, on the FILEs or on the planted corpus.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path

import yaml

from corpus_tools.cleaning.characters import Text, tokens
from corpus_tools.cleaning.duplicates import Deduplicator, fingerprint
from corpus_tools.cleaning.pipeline import clean
from corpus_tools.cleaning.rules import Duplicates, load_rules
from engine.bench.harness import describe_environment
from tests.kit.planted import Score, Writer, planted_corpus, score, table

WORDS_PER_TEXT, PAIRS = 300, 200


HELD_OUT_EN = """Sign in to your account|Log in with Facebook|Your cart is empty|Items per page: 20|Sort by: Price
Filter results|Quick links|Useful links|Stay connected|Join our mailing list|Enter your email address
We respect your privacy|Unsubscribe at any time|Report this ad|Listen to this article|Posted in Uncategorized
About the author|More from this author|Photo credit: Getty Images|Click to enlarge|Jump to recipe|Rate this recipe
Was this article helpful?|Tell us what you think|Return to main page|Joined: Mar 2008|Posts: 1,204|Quote
Send private message|Powered by phpBB|You cannot post new topics|Reply with quote|Browse by category
Change language|English / Español|Close this dialog|Skip ad|Cookie notice|© 2021 The Orchard Ltd.|42 shares
Subscribe to our channel|Follow us on Instagram for more|Read more about this topic|Terms & Conditions apply
View all comments (12)|Updated: 12 May 2020|Categories: Travel, Food|Next article: The Bridge|Site by Studio North
Please enable cookies to continue""".replace("\n", "|").split("|")
HELD_OUT_ZH = """欢迎关注我的博客|本帖最后由 admin 于 2012-3-4 编辑|楼主|发表于 2012-03-04 10:20|只看该作者|引用
使用道具|积分 1024|在线时间 35 小时|发帖|快速回复|您需要登录后才可以回帖|站长统计|技术支持：某某科技|推荐给好友|我要投稿
扫描下方二维码|关注我们|更多>>|[详细]|【打印】【关闭】|(责编：张三、李四)|图片来源：新华社|广告位招租|精彩导读|今日头条
热词：|版权与免责声明|凡本网注明来源的作品|未经书面授权禁止使用|全国统一热线|QQ群：123456|RSS订阅|网络异常|立即咨询|在线预约
沪公网安备 31010102000001号|本站内容版权归原作者所有|转载请保留本文链接|来源：人民网|编辑：小李|下一篇：山谷里的花园
点击图片查看大图|长按二维码关注|已阅读 2033 次|收藏(3)|分享到微信|返回首页>>
联系地址：北京市海淀区""".replace("\n", "|").split("|")


def held_out() -> list[str]:
    """How many lines of each list fall, and which stay; and what falls of the content."""
    rules = load_rules().lines.rules

    def falls(line: str) -> bool:
        return any(rule.removes(Text(line)) for rule in rules)

    lists = yaml.safe_load(Path(__file__).with_name("boilerplate.yaml").read_text(encoding="utf-8"))
    rows, stay = ["| list | lines | fall | recall |", "|---|--:|--:|--:|"], []
    for name, lines in ({"first, English": HELD_OUT_EN, "first, Chinese": HELD_OUT_ZH} | lists).items():
        fallen = [line for line in lines if falls(line)]
        if name.startswith("content"):
            stay += [f"Of the {len(lines)} of {name}, {len(fallen)} fall{': ' * bool(fallen)}{'; '.join(fallen)}.", ""]
            continue
        rows.append(f"| {name} | {len(lines)} | {len(fallen)} | {len(fallen) / len(lines):.2f} |")
        stay += [f"Of {name}, these stay: {'; '.join(line for line in lines if line not in fallen)}.", ""]
    return [*rows, "", *stay]


def planted_scores(seeds: int, folder: Path) -> list[Score]:
    """The scores of all seeds added up."""
    total: dict[str, Score] = {}
    for seed in range(seeds):
        planted = planted_corpus(seed)
        (folder / str(seed)).mkdir()
        corpus, evaluation = planted.write(folder / str(seed))
        out = folder / str(seed) / "out"
        report = clean([corpus], out, load_rules(), evaluation_files=[evaluation], num_examples=1 << 30)
        for s in score(planted, report):
            t = total.get(s.label, Score(s.label, 0, 0, 0))
            total[s.label] = Score(s.label, t.planted + s.planted, t.removed + s.removed, t.right + s.right)
    return [total[label] for label in sorted(total)]


def shingles(words: list[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


def near_duplicate_curve() -> list[str]:
    """Share of pairs called duplicates, by true similarity, as rows of a table."""
    rules, draw, writer = Duplicates(near=0.8), random.Random(0), Writer(0)
    found: dict[float, list[bool]] = {}
    for num_edits in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30):
        for pair in range(PAIRS):
            words = tokens(" ".join(writer.english() for _ in range(40)))[:WORDS_PER_TEXT]
            edited = list(words)
            for place in draw.sample(range(len(words)), num_edits):
                edited[place] = f"edit{pair}x{place}"
            one, other = shingles(words, rules.shingle), shingles(edited, rules.shingle)
            bucket = round(20 * len(one & other) / len(one | other)) / 20
            known = Deduplicator(rules)
            known.seen(fingerprint("", words, rules), "first")
            copy = known.seen(fingerprint("", edited, rules), "second")
            found.setdefault(bucket, []).append(copy is not None)
    rows = ["| true similarity (± 0.025) | pairs | called duplicates |", "|--:|--:|--:|"]
    for bucket, called in sorted(found.items(), reverse=True):
        rows.append(f"| {bucket:.2f} | {len(called):,} | {100 * sum(called) / len(called):.1f} % |")
    return rows


def speed(files: list[Path], folder: Path) -> str:
    before = os.times()
    report = clean(files, folder / "speed", load_rules(), on_error="skip")
    seconds = sum(b - a for a, b in zip(before[:4], os.times()[:4], strict=True))
    megabytes = report.bytes_in / 1e6
    return f"{megabytes:,.1f} MB in {seconds:.1f} processor seconds: {megabytes / seconds:.2f} MB/s per core."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="JSON lines with a field `text`, to measure the speed on")
    parser.add_argument("--seeds", type=int, default=5, help="of the planted corpus (default: %(default)s)")
    parser.add_argument("--markdown", type=Path, help="write the results to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        scores = planted_scores(args.seeds, folder)
        files = args.files or [folder / str(seed) / "corpus.jsonl" for seed in range(args.seeds)]
        lines = ["# Cleaning", "", "Made by `benchmarks/cleaning.py`; its docstring says what is measured.", ""]
        lines += [f"## Planted cases and decoys, {args.seeds} seeds", "", *table(scores), ""]
        lines += ["## Boilerplate held out", "", *held_out()]
        lines += ["## Near duplicates around the threshold of 0.8", "", *near_duplicate_curve(), ""]
        lines += ["## Speed", "", speed(files, folder), ""]
    facts = describe_environment(["rensa"])
    lines += [f"- {name}: " + (f"`{value}`" if name == "command" else value) for name, value in facts.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
