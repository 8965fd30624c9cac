"""Makes the golden files of `paceline-text`: small tokenizers, awkward strings, and the ids that the reference gives.

    pip install tokenizers==0.23.3 sentencepiece
    python goldens/text/make.py [TOKENIZER_JSON]

With TOKENIZER_JSON, the `tokenizer.json` of the bundled model, `bundled.json` is made too.

* byte_level.json   one byte-level BPE and its ids under each pre-tokenizer. It is trained on whole lines, so that its
                    merges cross every border that a pre-tokenizer may draw: a border in the wrong place changes ids.
* gemma4.json       BPE over characters with byte fallback, as in Gemma 4.
* spm.json          SentencePiece BPE, made and read by `sentencepiece` itself.
* bundled.json      the bundled model's own tokenizer.

Normalizers are left out on purpose: llama.cpp, whose reading of GGUF files is the reference, applies none.
Byte-level texts hold no white space, so lists of them are written as one string, separated by spaces or lines.
"""

import io
import json
import random
import sys
import unicodedata
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).parent

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE = {
    "qwen2": CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + TAIL,
    "qwen35": CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + TAIL,
    "llama-bpe": CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + TAIL,
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<think>", "</think>", "<tag>"]


def training_text():
    """Lines that make every kind of merge worth having; made up here, so free of any licence."""
    rng = random.Random(7)
    words = (
        "the a small river boat light under old stone bridge it's IT'S we're they'll I'm you'd don't can't won't "
        "return function value index while print list string error token model draft verify accept block tokenizer "
        "straße größer über été déjà naïve café señor mañana coração pão żółw łódź привет мир река слово "
        "नमस्ते दुनिया हिन्दी कि की का 你好 世界 河流 小船 東京 日本語 こんにちは カタカナ 안녕하세요 세계 שלום עולם مرحبا العالم "
        "สวัสดี tiếng Việt nước 😀 👩‍👩‍👧 🇫🇷 👍🏽 e\u0301 n\u0303 a\u0308"
    ).split()
    marks = [".", ",", "!", "?", ";", ":", "...", " -", "--", "(", ")", "()", "{", "}", "=", "==", "+=", "->", "\t", "  ", "    ", "   "]
    lines = []
    for i in range(3000):
        parts = []
        for _ in range(rng.randint(3, 12)):
            parts.append(rng.choice(words))
            pick = rng.random()
            if pick < 0.15:
                parts.append(rng.choice(marks))
            elif pick < 0.25:
                parts.append(str(rng.randint(0, 10 ** rng.randint(1, 6))))
            elif pick < 0.3:
                parts[-1] = parts[-1].capitalize()
        lines.append((" " * rng.choice([0, 0, 0, 2, 4]) + " ".join(parts) + rng.choice(["", "", "\n", "\r\n", "\n\n", "\n\n\n", "  \n"])))
    return lines


def awkward_strings():
    fixed = [
        "", " ", "  ", "   ", "a", " a", "a ", "  a", "   a   ", "\n", "\n\n", "\r\n", "\r", "\n ", " \n", "\n\n  b  \n c   ",
        "\t", "\t\t", "\ta", "a\tb", " \t \n\t x", "\r\n\r\n", "a\r\nb\r\n", "a\n\n\nb", "a \n b", "x\n  y\n    z\n", " \r \n ",
        "Hello, world! 12345 it's  IT'S", "x=foo(1);\r\n\treturn", "it's IT'S It'S we're WE'RE I'm I'M they'll THEY'LL you'd YOU'D we've don't",
        "'s't're've'm'll'd", "'S'T'RE'VE'M'LL'D", "'x 'y '", "''s", "'\u017f", "it'\u017f a\u017fk", "'l 'r 'v 'lx", "'", "' s", "o'clock rock'n'roll",
        "0", "12", "123", "1234", "1234567890", "3.14159", "1,000,000", "1e-5", "0x1F", "v2.0.1-rc3", "2024-02-29T12:00:00Z",
        "٣٤٥٦٧", "१२३४", "Ⅷ½²③", "x²+y³", "１２３", "a1b2c3", "1a 2b", " 1", "  12", "1 2  3   4", "50%", "$9.99", "#1",
        "!", "!!", " !", "  !!", "!\n", "!\n\n", " !?\r\n", "... ...", "a.b,c;d:e", "(a)(b)", "{}[]<>", "->=>", "!=\n\n\nx", "--flag=value",
        "_under_score", "__init__", "camelCase", "SCREAMING_CASE", "kebab-case", "path/to/file.rs", "C:\\dir\\file", "user@host.org", "https://a.b/c?d=e&f=g#h",
        "e\u0301", " e\u0301t", "\u0301", " \u0301", "\u0301a", "a\u0301\u0302\u0303b", "1\u0301", ".\u0301", "\n\u0301", "n\u0303o a\u0308b", "caf\u00e9 cafe\u0301",
        "नमस्ते दुनिया", "\u0928\u092e\u0938\u094d\u0924\u0947", "हिन्दी में १२३", "क्षत्रिय", "தமிழ்", "สวัสดี ครับ", "ภาษาไทย", "မြန်မာ", "ខ្មែរ",
        "你好", "你好，世界！", "小船 河流", "日本語のテキスト", "カタカナ・ひらがな", "안녕하세요 세계", "한\u1100\u1161", "𠀀𠀁", "㈠㊀", "　全角　",
        "😀", "😀😀", "a😀b", " 😀", "👩‍👩‍👧", "👩\u200d👩", "🇫🇷🇩🇪", "👍🏽", "☺\ufe0f", "❤️‍🔥", "1️⃣", "\U0001f9d1\U0001f3ff\u200d\U0001f680",
        "שלום עולם", "مرحبا بالعالم", "مُحَمَّد", "\u202eabc\u202c", "a\u200eb", "שָׁלוֹם", "فارسی\u200cنویسی",
        "straße GRÖSSER", "Ǆǅǆ", "ﬁﬂ", "İıIi", "K\u212a Å\u212b", "привет, мир!", "Ελληνικά ΐ", "ქართული Ქ", "Հայերեն", "tiếng Việt nước",
        "\x00", "a\x00b", "\x01\x02", "\x1f", "\x1c\x1d", "\x7f", "\x80\x85\x9f", "a\x85b", "\u00a0", "a\u00a0b", "\u00a0\u00a0x", "\u2028", "a\u2028b\u2029", "\u3000x",
        "\u200b", "a\u200bb", "\ufeff", "\ufeffa", "\ufffd", "\ufffe", "\ue000", "\U0010ffff", "\u00ad", "a\u00adb", "\u180e", "\u1680x", "\u2003 x", "\v\f x",
        "ʰʲ", "ªº", "ⅷ", "〇", "々", "ー", "ゝ", "^`¨", "¯¸", "€£¥", "±×÷", "∀∃∅", "←→", "█▓", "①", "¼", "ᛮ", "𝟘𝟙", "𝒜𝔅", "ⓐⓑ",
        "a" * 300, " " * 300, "\n" * 200, "1" * 200, "." * 200, "ab" * 150, "\u0301" * 100, " \n" * 100, "😀" * 50, "'s" * 50, " a" * 100,
        " " * 64 + "x", "\n" * 40 + " " * 40 + "x", "\t" * 33 + "\n", "é" * 100, "河" * 100, " 1" * 50, "a\n" * 60,
        "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|><|im_end|>", "a<|endoftext|>b", " <|im_end|> ", "<|im_end|", "<|im_end|>>", "<<|im_end|>",
        "<think>\nhm\n</think>\n\nyes", "x<tag>y", " <tag> ", "<tag><tag>", "<ta", "<think></think>", "it's<tag>'s", "1<tag>2", "\n<tag>\n", "é<tag>\u0301",
        "\u2581", "a\u2581b", "\u2581\u2581x", "Ġ", "Ċ", "ĠtheĠ", "<0x41>", "<0x0A>", "<unk>", "<s>", "</s>", "[PAD1]",
        "fn main() {\n    println!(\"hi\");\n}\n", "def f(x):\n\treturn x ** 2  # square\n", "if (a && b) || !c { d(); }", "SELECT * FROM t WHERE a = 'b';",
        "| a | b |\n|---|---|\n| 1 | 2 |", "# Title\n\n* item\n  * sub\n", "{\"a\": [1, 2.5, null], \"b\": \"\\n\"}", "<p class=\"x\">text</p>",
    ]
    rng = random.Random(11)
    alphabet = list("aAbé ſ's12.,\n\r\t ()\u0301\u094d你😀\u200d\u00a0\u0928٣½_") + [" ", " ", "'s", "the ", "\r\n", "  "]
    mixed = ["".join(rng.choice(alphabet) for _ in range(rng.randint(2, 40))) for _ in range(60)]
    return fixed + mixed


def byte_level_tokenizer(vocab, merges, pattern, ignore_merges):
    tok = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL])
    tok.add_tokens([AddedToken(t, normalized=False, special=False) for t in USER_DEFINED])
    return tok, split


def encodings(tok, strings):
    """Ids with special tokens read as such, and as text where that differs: {index: ids}."""
    tok.encode_special_tokens = False
    parsed = [tok.encode(s, add_special_tokens=False).ids for s in strings]
    tok.encode_special_tokens = True
    plain = [tok.encode(s, add_special_tokens=False).ids for s in strings]
    tok.encode_special_tokens = False
    return {"ids": parsed, "plain": {str(i): p for i, (p, q) in enumerate(zip(plain, parsed)) if p != q}}


def piece_lengths(split, text):
    return [len(piece) for piece, _ in split.pre_tokenize_str(text)]


def decodings(tok, n_vocab, seed):
    rng = random.Random(seed)
    out = []
    for _ in range(40):
        ids = [rng.randrange(n_vocab) for _ in range(rng.randint(1, 12))]
        out.append([ids, tok.decode(ids, skip_special_tokens=False)])
    return out


def by_id(vocab):
    return [text for text, _ in sorted(vocab.items(), key=lambda item: item[1])]


def write(name, data):
    path = HERE / name
    path.write_text(json.dumps(data, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")
    print(name, path.stat().st_size)


def make_byte_level(strings):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tok.train_from_iterator(training_text(), trainer)
    model = json.loads(tok.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(m) for m in model["merges"]]
    # Ids in no order at all, so that taking a rank for an id, or the reverse, cannot go unseen.
    texts = by_id(vocab)
    random.Random(3).shuffle(texts)
    # Tokens that no merge makes: `ignore_merges` alone finds them.
    texts += ["Ġbridgework", "Ċĉ", "1234"[:3] if "123" not in vocab else "999"]
    vocab = {text: i for i, text in enumerate(dict.fromkeys(texts))}
    texts = by_id(vocab)
    strings = strings + [" bridgework", "a bridgework", "bridgework", "123", "999", "\n\tx"]
    data = {"model": "gpt2", "tokens": " ".join(texts), "merges": "\n".join(" ".join(m) for m in merges),
            "control": CONTROL, "user_defined": USER_DEFINED, "strings": strings, "pre": {}}
    for name, pattern in PRE.items():
        tok, split = byte_level_tokenizer(vocab, merges, pattern, ignore_merges=name == "llama-bpe")
        data["pre"][name] = encodings(tok, strings) | {"pieces": [piece_lengths(split, s) for s in strings]}
    data["decode"] = decodings(tok, tok.get_vocab_size(), 5)
    write("byte_level.json", data)


def make_bundled(path, strings):
    source = json.loads(Path(path).read_text(encoding="utf-8"))
    source["normalizer"] = None
    tok = Tokenizer.from_str(json.dumps(source))
    model, added = source["model"], [t["content"] for t in source["added_tokens"]]
    data = {"model": "gpt2", "tokens": " ".join(by_id(model["vocab"])), "merges": "\n".join(" ".join(m) for m in model["merges"]),
            "control": added, "user_defined": [], "strings": strings,
            "pre": {"qwen2": encodings(tok, strings)}, "decode": decodings(tok, tok.get_vocab_size(), 6)}
    write("bundled.json", data)


def make_gemma4(strings):
    normalizer = normalizers.Replace(" ", "\u2581")
    pre = pre_tokenizers.Split(Regex(r"[^\n]+|[\n]+"), behavior="isolated")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    trainer_tok = Tokenizer(models.BPE(unk_token="<unk>"))
    trainer_tok.normalizer, trainer_tok.pre_tokenizer = normalizer, pre
    trainer = trainers.BpeTrainer(vocab_size=1100, special_tokens=special + byte_tokens, limit_alphabet=160, show_progress=False)
    trainer_tok.train_from_iterator(training_text(), trainer)
    model = json.loads(trainer_tok.to_str())["model"]
    merges = [tuple(m) for m in model["merges"]]
    tok = Tokenizer(models.BPE(vocab=model["vocab"], merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer, tok.pre_tokenizer = normalizer, pre
    tok.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special + CONTROL])
    tok.add_tokens([AddedToken(t, normalized=False, special=False) for t in USER_DEFINED])
    data = {"model": "gemma4", "tokens": by_id(model["vocab"]), "merges": ["{} {}".format(*m) for m in merges],
            "control": special + CONTROL, "user_defined": USER_DEFINED, "strings": strings, "pre": {"gemma4": encodings(tok, strings)}}
    write("gemma4.json", data)


def make_spm(strings):
    out = io.BytesIO()
    sentences = (line for text in training_text() for line in text.splitlines() if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=out, model_type="bpe", vocab_size=1000, byte_fallback=True,
        character_coverage=0.98, normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=True,
        split_digits=True, user_defined_symbols=["<tag>"], minloglevel=2, num_threads=1,
    )
    sp = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    kinds = [2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 6 if sp.is_byte(i) else 4 if sp.id_to_piece(i) == "<tag>" else 1
             for i in range(sp.get_piece_size())]
    # sentencepiece puts its extra space before the text only; GGUF tokenizers also after each special token.
    strings = [s for s in strings if "<tag>" not in s]
    data = {"model": "llama", "tokens": [sp.id_to_piece(i) for i in range(sp.get_piece_size())], "kinds": kinds,
            "scores": [round(sp.get_score(i), 4) for i in range(sp.get_piece_size())], "strings": strings, "ids": [sp.encode(s) for s in strings]}
    write("spm.json", data)


if __name__ == "__main__":
    STRINGS = list(dict.fromkeys(awkward_strings()))
    print(len(STRINGS), "strings")
    make_byte_level(STRINGS)
    make_gemma4(STRINGS)
    make_spm(STRINGS)
    if len(sys.argv) > 1:
        make_bundled(sys.argv[1], STRINGS)
