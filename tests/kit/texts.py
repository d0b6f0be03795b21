"""Text for the tests: the standard library's sources, and Chinese made of a handful of words."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

WORDS = (
    "世界 中国 语言 模型 训练 数据 学习 机器 计算 文字 今天 天气 我们 他们 可以 需要 因为 所以 如果 虽然 "
    "但是 问题 时间 地方 工作 生活 研究 方法 结果 系统 图书馆 大学生 人工智能 春天 花园 河流 山谷 月亮 太阳 "
    "的 是 在 有 和 了 不 也 很 都"
).split()


def english_texts(num_files: int = 30) -> list[str]:
    """Sources and doc strings of the standard library: prose, code, tabs, indentation, long lines."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path.read_text(encoding="utf-8") for path in paths[:num_files]]


def chinese_texts(num_texts: int = 60, seed: int = 0) -> list[str]:
    """Paragraphs of random words with Chinese punctuation, some Latin letters and digits."""
    draw = random.Random(seed)

    def sentence() -> str:
        words = draw.choices(WORDS, k=draw.randint(4, 14))
        if draw.random() < 0.2:
            words.insert(draw.randrange(len(words)), draw.choice(["GPU", "3.14", " Llama ", "2024年"]))
        return "，".join(["".join(words[:5]), "".join(words[5:])]).strip("，") + draw.choice("。！？")

    return ["\n".join("".join(sentence() for _ in range(5)) for _ in range(4)) for _ in range(num_texts)]
