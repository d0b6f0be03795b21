"""A corpus with planted cases for every rule of `octant data clean`, and decoys that look like them and must stay.

Every planted thing has a label, the rule that must find it, and a place: the document it stands in and, for lines and
masks, the text.  `score` compares that with what a run removed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from corpus_tools.cleaning.report import EXCERPT_CHARACTERS, Report
from tests.kit.texts import WORDS

NOUNS = """river mountain teacher engine garden library method question window market bridge student village machine
forest letter painter island kitchen harbour signal doctor theory castle pattern journey winter number orchard
language weather member factory lantern captain system meadow history balance novel kettle valley station""".split()
VERBS = """follows describes changes remembers carries explains builds watches paints answers repairs discovers crosses
measures protects visits completes imagines collects improves""".split()
OTHERS = """quiet early narrow common distant simple broken careful bright ancient gentle useful hidden steady small
curious patient northern wooden ordinary""".split()


@dataclass(frozen=True, order=True)
class Plant:
    """Something a rule must remove: in which document, and for lines and masks which text."""

    label: str
    document: int
    text: str = ""


@dataclass
class Planted:
    """Documents and what is planted in them; `evaluation` is the set to keep out."""

    documents: list[str] = field(default_factory=list)
    plants: list[Plant] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)

    def add(self, text: str, label: str = "") -> int:
        """A document; with a label, one that must go."""
        self.documents.append(text)
        if label:
            self.plants.append(Plant(label, len(self.documents) - 1))
        return len(self.documents) - 1

    def write(self, folder: Path) -> tuple[Path, Path]:
        """`corpus.jsonl` and `evaluation.jsonl`."""
        corpus, evaluation = folder / "corpus.jsonl", folder / "evaluation.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.documents))
        evaluation.write_text("".join(json.dumps({"question": text, "n": 1}) + "\n" for text in self.evaluation))
        return corpus, evaluation


LINES = {
    "upper_case": ["BUY NOW AND SAVE ON EVERYTHING", "LIMITED TIME OFFER!!! CALL", "ÜBER ALLES GRÖSSER UND BESSER"],
    "digits": ["123 456 789", "2024-01-31 12:30", "1,234.50 | 2,345.60 | 17%", "３４５６７８９"],
    "symbols": ["=================", "★☆★☆★☆ >>> <<<", "→→→ + + + = ✓✓✓"],
    "punctuation": ["-----------------", "。。。。。。！！！！", "........... ... (...)", "****** // ******"],
    "menu_en": [
        "Home | About Us | Contact", "Share on Facebook", "« Previous", "Toggle navigation", "View cart", "Search for:",
        "Related posts", "Advertisement", "12 comments", "Privacy Policy / Terms of Use / Sitemap", "Add to Cart",
        "Login   Register",
    ],
    "interface_en": [
        "Share your account settings", "Subscribe to comments", "Reply to this thread", "Report post to a moderator",
        "Follow this author on Twitter", "Photo gallery: view all images", "Search all members of this forum",
    ],
    "interface_zh": [
        "登录后查看更多评论", "发表于 2019-3-4 只看楼主", "点击加载更多回复", "分享到微信朋友圈", "楼主的其他主题帖子",
    ],
    "menu_zh": [
        "首页 | 登录 | 注册", "返回顶部", "相关阅读", "[打印本页] [关闭窗口]", "猜你喜欢", "上一篇 下一篇", "我要评论",
        "分享到：微信 微博 QQ空间", "热门文章：", "网站首页 > 新闻中心", "登录 注册 收藏本站",
    ],
    "boilerplate_en": [
        "This website uses cookies to improve your experience.", "© 2019 The Meadow Company. All rights reserved.",
        "Read our Privacy Policy here", "Click here to subscribe", "Sign up for our newsletter today",
        "Please enable JavaScript to view this page.", "1,024 followers", "Next post: The Harbour", "Posted by admin",
        "Your email address will not be published.", "Powered by WordPress", "Page 2 of 17", "Tags: harbour, meadow",
        "You must be logged in to post a comment.", "Follow us on Twitter", "Log in with your account to comment",
        "By continuing to use this site you agree to the terms.", "Last updated on May 3, 2014",
    ],
    "boilerplate_zh": [
        "版权所有 未经授权不得转载", "上一篇：春天的花园", "下一篇:没有了", "京ICP备12345678号",
        "责任编辑：王小明", "发布时间：2020年1月1日", "点击查看更多内容", "扫描二维码下载客户端",
        "关注微信公众号获取更多", "当前位置：首页 > 新闻 > 正文", "请先登录后评论", "转载请注明出处",
        "浏览次数：1024 次", "本文仅代表作者个人观点，与本网站无关", "如有侵权请联系删除", "共5页 上一页 下一页",
        "联系电话：请看首页", "赞(12)", "已有 12 人参与", "字号：大 中 小",
    ],
}  # fmt: skip

MASKS = {
    "email": ["jane.doe@example.com", "info+list@mail.some-site.co.uk", "zhang_san88@163.com"],
    "chinese_id": ["11010519491231002X", "440308199901101512"],
    "card_number": ["4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005", "6011111111111117"],
    "us_social_security": ["123-45-6789", "078-05-1120"],
    "phone_cn": ["13812345678", "138-1234-5678", "+86 13912345678", "010-62345678", "(021) 61234567"],
    "phone_us": ["(415) 555-2671", "415-555-2671", "+1 415-555-2671", "212.555.0187"],
    "phone_international": ["+44 20 7946 0958", "+49-30-901820", "+81 3 1234 5678"],
}

DECOY_LINES = [
    "She works for NASA and for the BBC.", "In 1969 two men walked on the moon, and 600 million people watched.",
    "The court found that the privacy policy of the company, which nobody had read in full for years, broke the law.",
    "He said that all the rights of the members were reserved for a later meeting.",
    "5 of the 12 bridges were repaired.", "x = 3 + 4 means that x is seven.",
    "Tea costs $3, cake costs €4 – or £3.50.", "他在2003年写了一篇关于版权的文章，讨论法律的变化。",
    "上一次见面的时候，我们谈了很久。", "编辑部的工作需要很多耐心。",
    "我们点击鼠标，打开了那个系统的窗口，开始研究数据。",
    "The home of the painter stands near the harbour; contact with the village was rare.",
    "Share the bread, he said, and follow us to the river.", "Posted letters took two weeks to arrive.", "And then",
    "我们的首页设计需要研究，登录的方法也需要说明。", "作者认为这个问题很重要。", "他转载了那篇文章吗？没有人知道。",
    "Next to the market, the previous owner built a page of stone.", "print()", "返回的时候，天气很好。",
]  # fmt: skip
DECOY_NUMBERS = [
    "4111 1111 1111 1112", "110105194912310021", "978-3-16-148410-0", "2024-01-31", "3.14159265358979", "192.168.10.25",
    "12345678", "100-200-300", "000-12-3456", "version 1.10.2-4", "5 @ 10 cents", "1-800", "12:30:45", "+5", "+1 000",
    "33-333-3333",
]  # fmt: skip


class Writer:
    """Random prose without anything a rule looks for."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)

    def english(self) -> str:
        d = self.draw
        middle = f" and {d.choice(VERBS)} the {d.choice(OTHERS)} {d.choice(NOUNS)}" if d.random() < 0.5 else ""
        start = d.choice(["The", "Every", "A", "One", "That"])
        return (
            f"{start} {d.choice(OTHERS)} {d.choice(NOUNS)} {d.choice(VERBS)} the {d.choice(OTHERS)} {d.choice(NOUNS)}"
            f" near the {d.choice(NOUNS)}{middle}."
        )

    def chinese(self) -> str:
        words = self.draw.choices(WORDS, k=self.draw.randint(8, 16))
        return "".join(words[:6]) + "，" + "".join(words[6:]) + "。"

    def lines(self, num_lines: int = 8) -> list[str]:
        """Paragraphs in one of the two languages."""
        sentence = self.draw.choice([self.english, self.chinese])
        return [" ".join(sentence() for _ in range(self.draw.randint(2, 4))) for _ in range(num_lines)]

    def text(self, num_lines: int = 8) -> str:
        return "\n".join(self.lines(num_lines))


def planted_corpus(seed: int = 0, num_each: int = 20) -> Planted:
    """Clean documents, decoys, and `num_each` or more cases for every rule; copies stand behind their originals."""
    writer, planted = Writer(seed), Planted()
    for _ in range(5 * num_each):
        planted.add(writer.text())
    _plant_documents(planted, writer, num_each)
    _plant_lines(planted, writer, num_each)
    _plant_masks(planted, writer, num_each)
    _plant_contamination(planted, writer, num_each)
    _plant_copies(planted, writer, num_each)
    return planted


def _plant_documents(planted: Planted, writer: Writer, num_each: int) -> None:
    draw = writer.draw
    foreign = [
        "Это обычный текст о том, как живут люди в большом городе. ",
        "これは日本語の普通の文章です。私たちは町に住んでいます。",
        "이것은 평범한 한국어 문장입니다. 우리는 도시에 삽니다. ",
        "هذا نص عادي عن الحياة في المدينة الكبيرة. ",
        "Αυτό είναι ένα συνηθισμένο κείμενο για την πόλη. ",
    ]
    for index in range(num_each):
        planted.add(" ".join(writer.draw.choices(NOUNS, k=draw.randint(1, 15))) + ".", "words")
        planted.add("\n".join(foreign[index % 5] * draw.randint(2, 4) + str(index) for _ in range(5)), "language")
        stuttering = ("; ".join(draw.choices("abcdefghij", k=40)) + " ...," for _ in range(6))
        planted.add("\n".join(stuttering), "document_punctuation")
        emoji = ["😀", "★", "→", "♥", "€"]
        chat = (" ".join(w + draw.choice(emoji) for w in draw.choices(["ok", "hi", "go"], k=20)) for _ in range(6))
        planted.add("\n".join(chat), "document_symbols")
        lines = writer.lines(4)
        planted.add("\n".join(draw.choices(lines, k=14)), "repeated_lines")
        sentence = writer.english() + " " + writer.english()
        planted.add(" ".join([*(sentence for _ in range(10)), writer.english()]), "repeated_ngrams")
        spam = ["online casino", "Viagra", "payday loan"] if index % 2 else ["六合彩", "代开发票", "真人娱乐"]
        planted.add("\n".join([*writer.lines(4), *(f"{writer.english()} {word}" for word in spam)]), "spam")
        fallen = draw.sample(LINES["boilerplate_en"] + LINES["boilerplate_zh"], 6)
        planted.add("\n".join([*writer.lines(2), *fallen]), "lines_dropped")
        planted.add(draw.choice(["", " ", "\n\n", "\t \n"]), "empty")


def _plant_lines(planted: Planted, writer: Writer, num_each: int) -> None:
    for label, texts in LINES.items():
        for index in range(max(num_each, len(texts))):
            lines = writer.lines()
            line = texts[index % len(texts)]
            lines.insert(writer.draw.randint(0, len(lines)), line)
            planted.plants.append(Plant(label, planted.add("\n".join(lines)), line))
    for line in DECOY_LINES:
        planted.add("\n".join([*writer.lines(), line]))


def _plant_masks(planted: Planted, writer: Writer, num_each: int) -> None:
    frames = ["{} {} {}", "{} ({}) {}", "{} 联系{}。{}", "{} at {}, {}"]
    for label, texts in MASKS.items():
        for index in range(max(num_each, len(texts))):
            secret = texts[index % len(texts)]
            line = frames[index % len(frames)].format(writer.english(), secret, writer.english())
            document = planted.add("\n".join([*writer.lines(), line]))
            planted.plants.append(Plant(label, document, secret))
    for number in DECOY_NUMBERS:
        planted.add("\n".join([*writer.lines(), f"{writer.english()} {number} {writer.english()}"]))


def _plant_contamination(planted: Planted, writer: Writer, num_each: int) -> None:
    """Evaluation texts inside documents, in other case and punctuation; and fragments too short to count."""
    for index in range(num_each):
        question = " ".join(writer.english() if index % 2 else writer.chinese() for _ in range(4))
        planted.evaluation.append(question)
        copied = question.upper().replace(".", " !") if index % 2 else question.replace("，", " ")
        planted.add("\n".join([*writer.lines(4), f"{writer.english()} {copied}", *writer.lines(4)]), "contamination")
        fragment = " ".join(question.split()[:9]) if index % 2 else question.replace("，", "")[:11]
        planted.add("\n".join([*writer.lines(4), f"{fragment} xyz", *writer.lines(4)]))
    planted.evaluation.append("Too short.")


def _plant_copies(planted: Planted, writer: Writer, num_each: int) -> None:
    """Exact copies (other case, spacing, punctuation), near copies, and texts that share a third: decoys."""
    for index in range(num_each):
        lines = writer.lines(12)
        planted.add("\n".join(lines))
        same = [line.replace(".", "").replace("。", "").replace(" the ", " THE ") for line in lines]
        planted.add(("\n\n" if index % 2 else "\n").join(same), "exact_duplicate")
        edited = list(lines)
        for place in writer.draw.sample(range(len(edited)), 2):
            edited[place] = edited[place].replace("the", "this", 1) if "the" in edited[place] else edited[place] + "好"
        planted.add("\n".join(edited), "near_duplicate")
        planted.add("\n".join([*lines[:4], *writer.lines(8)]))


@dataclass(frozen=True)
class Score:
    """How well one rule did."""

    label: str
    planted: int
    removed: int
    right: int

    @property
    def precision(self) -> float:
        return self.right / max(1, self.removed)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.planted)


def score(planted: Planted, report: Report) -> list[Score]:
    """Compare what was planted with what a run (that kept every example) removed.

    Lines of documents that fell as a whole count for the document only.
    """
    fallen = {plant.document for plant in planted.plants if plant.label == "lines_dropped"}
    wanted: dict[str, set[Plant]] = {}
    for plant in planted.plants:
        wanted.setdefault(plant.label, set()).add(plant)
    scores = []
    for label in sorted({*wanted, *report.rules}):
        examples = report.rules[label].examples if label in report.rules else []
        whole = {plant.text for plant in wanted.get(label, ())} <= {""}
        found = {
            Plant(label, document, "" if whole else example.text)
            for example in examples
            if (document := int(example.source.rpartition("line ")[2]) - 1) not in fallen or label == "lines_dropped"
        }
        right = len(found & _as_reported(wanted.get(label, ())))
        scores.append(Score(label, len(wanted.get(label, ())), len(found), right))
    return scores


def _as_reported(plants: Iterable[Plant]) -> set[Plant]:
    """Plants with their text as the report shows it."""
    return {Plant(p.label, p.document, " ".join(p.text.split())[:EXCERPT_CHARACTERS]) for p in plants}


def table(scores: Sequence[Score]) -> list[str]:
    """Rows of a Markdown table."""
    rows = ["| rule | planted | removed | precision | recall |", "|---|--:|--:|--:|--:|"]
    return rows + [f"| {s.label} | {s.planted} | {s.removed} | {s.precision:.3f} | {s.recall:.3f} |" for s in scores]
