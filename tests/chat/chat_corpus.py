"""What these tests train tokenizers on: sources of the standard library, and scripts of the world."""

import argparse
import inspect
import textwrap

SCRIPTS = """Größe, naïve café, élève. Привет, мир! Καλημέρα κόσμε. 你好，世界。今天天气很好，我们去公园。
日本語の文章です。한국어 문장입니다.
مرحبا بالعالم. नमस्ते दुनिया. สวัสดีชาวโลก 👨‍👩‍👧 🇩🇪 12345 ١٢٣٤٥ ½ ²\r\n\t\u00a0\u3000 end
"""


def corpus() -> list[str]:
    return [
        inspect.getsource(argparse),
        inspect.getsource(textwrap),
        inspect.getsource(inspect),
        SCRIPTS * 20,
    ]
