//! Vocabularies and tokenizers made by hand: what files get wrong, what ends an answer, where BOS goes.

use std::time::{Duration, Instant};

use paceline_gguf::Metadata;
use paceline_text::bpe::char_of_byte;
use paceline_text::{Encode, StreamDecoder, Token, TokenKind, TokenTable, Tokenizer, TokenizerModel, Vocab};
use proptest::prelude::*;

const PARSED: Encode = Encode { add_bos: true, parse_special: true };

/// A file of byte tokens, `extra` tokens of a kind each, and merges.
fn metadata(extra: &[(&str, TokenKind)], merges: &[&str]) -> Metadata {
    let mut metadata = Metadata::for_file("m.gguf");
    let bytes = (0..=255).map(|byte| char_of_byte(byte).to_string());
    let tokens: Vec<String> = bytes.chain(extra.iter().map(|(text, _)| (*text).to_owned())).collect();
    let kinds: Vec<i32> = [1; 256].into_iter().chain(extra.iter().map(|(_, kind)| *kind as i32)).collect();
    metadata.insert("tokenizer.ggml.model", "gpt2");
    metadata.insert("tokenizer.ggml.pre", "qwen2");
    metadata.insert("tokenizer.ggml.tokens", tokens);
    metadata.insert("tokenizer.ggml.token_type", kinds);
    metadata.insert("tokenizer.ggml.merges", merges.iter().map(|m| (*m).to_owned()).collect::<Vec<String>>());
    metadata
}

use TokenKind::{Control, Normal, Unused, UserDefined};

/// The texts of the tokens of `text`, with a dot between them.
fn pieces(tokenizer: &Tokenizer, text: &str) -> String {
    let tokens = tokenizer.encode(text, PARSED);
    let texts =
        tokens.iter().map(|&token| String::from_utf8_lossy(tokenizer.vocab().text(token)).into_owned());
    texts.collect::<Vec<_>>().join("·")
}

#[test]
fn damaged_files_are_refused_by_name() {
    let check = |change: &dyn Fn(&mut Metadata), expected: &str| {
        let mut metadata = metadata(&[("ab", Normal)], &["a b"]);
        change(&mut metadata);
        let message = Tokenizer::from_metadata(&metadata).unwrap_err().to_string();
        assert!(message.contains(expected), "{message:?} does not say {expected:?}");
    };
    check(&|m| drop(m.remove("tokenizer.ggml.model")), "`tokenizer.ggml.model`");
    check(&|m| drop(m.remove("tokenizer.ggml.tokens")), "`tokenizer.ggml.tokens`");
    check(&|m| drop(m.remove("tokenizer.ggml.merges")), "`tokenizer.ggml.merges`");
    check(
        &|m| m.insert("tokenizer.ggml.model", "bert"),
        "`bert` is not supported; known are gpt2, gemma4, llama",
    );
    check(&|m| m.insert("tokenizer.ggml.model", "llama"), "`tokenizer.ggml.scores`");
    check(&|m| m.insert("tokenizer.ggml.pre", "qwen9"), "`qwen9` is not supported; known are qwen2");
    check(&|m| m.insert("tokenizer.ggml.tokens", Vec::<String>::new()), "at least one token");
    check(&|m| m.insert("tokenizer.ggml.tokens", 3u32), "expected array of string");
    check(&|m| m.insert("tokenizer.ggml.token_type", vec![1i32; 3]), "expected 257 entries");
    check(
        &|m| m.insert("tokenizer.ggml.eos_token_id", 257u32),
        "`tokenizer.ggml.eos_token_id`: expected an id below 257",
    );
    check(&|m| m.insert("tokenizer.ggml.mask_token_id", -2i32), "`tokenizer.ggml.mask_token_id`");
    check(&|m| m.insert("tokenizer.ggml.suppress_tokens", vec![5u32, 300]), "found 300");
    check(
        &|m| m.insert("tokenizer.ggml.merges", vec!["a b".to_owned(), "ab".to_owned()]),
        "merges[1]`: expected two symbols",
    );
    check(&|m| m.insert("tokenizer.ggml.merges", vec!["a ".to_owned()]), "merges[0]`");
    let mut spm = metadata(&[], &[]);
    spm.insert("tokenizer.ggml.model", "llama");
    spm.insert("tokenizer.ggml.scores", vec![f32::NAN; 256]);
    assert!(Tokenizer::from_metadata(&spm).unwrap_err().to_string().contains("NaN at 0"));
}

#[test]
fn an_id_of_minus_one_means_none() {
    let mut metadata = metadata(&[], &[]);
    metadata.insert("tokenizer.ggml.bos_token_id", -1i32);
    metadata.insert("tokenizer.ggml.padding_token_id", u32::MAX);
    let vocab = Vocab::from_metadata(&metadata).unwrap();
    assert_eq!((vocab.bos(), vocab.special().padding), (None, None));
}

#[test]
fn merges_may_pass_through_texts_that_are_no_tokens() {
    // "bc" is no token, but the way from "b" and "c" to "abc"; "xy" is none and stays bytes.
    let file = metadata(&[("abc", Normal)], &["b c", "a bc", "x y", "x y"]);
    let tokenizer = Tokenizer::from_metadata(&file).unwrap();
    assert_eq!(pieces(&tokenizer, "abcbcxy"), "abc·b·c·x·y");
}

#[test]
fn what_ends_an_answer() {
    let mut file = metadata(
        &[
            ("<|im_end|>", Normal),
            ("</s>", Control),
            ("<|file_sep|>", Control),
            ("hello", Normal),
            ("<eos>", Unused),
        ],
        &[],
    );
    file.insert("tokenizer.ggml.eos_token_id", 257u32);
    let vocab = Vocab::from_metadata(&file).unwrap();
    assert_eq!(vocab.end_of_generation(), [256, 257, 258]);
    assert!(vocab.is_eog(256) && !vocab.is_eog(259) && !vocab.is_eog(0));
    // Typed as text by a careless converter, but a turn marker all the same.
    assert_eq!(vocab.kind(256), Control);
    assert_eq!(vocab.bytes(256, false), b"");
}

/// Files that type the tags as control tokens, which are not shown, would run thoughts into the answer.
#[test]
fn tags_of_thoughts_are_text() {
    for kind in [Control, UserDefined, Normal] {
        let metadata = metadata(&[("<think>", kind), ("</think>", kind), ("<|x|>", Control)], &[]);
        let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
        let mut decoder = StreamDecoder::new(tokenizer.vocab().clone(), false);
        let shown: String = [256, 97, 257, 98, 258].map(|token| decoder.push(token)).concat();
        assert_eq!(shown, "<think>a</think>b", "{kind:?}");
    }
    let metadata = metadata(&[("<think>", Control)], &[]);
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(pieces(&tokenizer, "a<think>b"), "a·<think>·b");
}

#[test]
fn what_ends_an_answer_in_gemma() {
    let mut table = TokenTable::new(TokenizerModel::Gemma);
    let texts =
        ["<pad>", "<eos>", "<bos>", "<unk>", "</s>", "<|tool_response>", "<turn|>", "\u{2581}a\u{2581}"];
    table.tokens = texts.into_iter().collect();
    table.kinds =
        vec![Control, Control, Control, TokenKind::Unknown, UserDefined, UserDefined, Control, Normal];
    table.special.bos = Some(2);
    table.special.eos = Some(1);
    table.special.eot = Some(4);
    table.add_bos = Some(false);
    let vocab = Vocab::new(&table).unwrap();
    assert_eq!(vocab.end_of_generation(), [1, 5, 6]);
    assert!(vocab.add_bos(), "Gemma answers nonsense without it, whatever the file says");
    assert_eq!(
        (vocab.bytes(5, false), vocab.bytes(7, false), vocab.bytes(3, false)),
        (&b"<|tool_response>"[..], &b" a "[..], &b""[..])
    );
}

#[test]
fn bos_comes_once() {
    let mut file = metadata(&[("<s>", Control), ("<t>", Control)], &[]);
    file.insert("tokenizer.ggml.bos_token_id", 256u32);
    let none = Tokenizer::from_metadata(&file).unwrap();
    assert_eq!(pieces(&none, "a"), "a", "qwen2 wants none unless the file says so");
    file.insert("tokenizer.ggml.add_bos_token", true);
    let wanted = Tokenizer::from_metadata(&file).unwrap();
    assert_eq!(pieces(&wanted, "a"), "<s>·a");
    assert_eq!(pieces(&wanted, "<s>a"), "<s>·a");
    assert_eq!(pieces(&wanted, "<s><s>a<s>"), "<s>·<s>·a·<s>");
    assert_eq!(pieces(&wanted, "<t><s>"), "<s>·<t>·<s>");
    assert_eq!(pieces(&wanted, ""), "<s>");
    assert_eq!(wanted.encode("a", Encode { add_bos: false, ..PARSED }).len(), 1);
    file.remove("tokenizer.ggml.add_bos_token");
    file.insert("tokenizer.ggml.pre", "llama-bpe");
    assert_eq!(pieces(&Tokenizer::from_metadata(&file).unwrap(), "a"), "<s>·a", "llama-bpe wants one");
}

#[test]
fn user_text_cannot_hold_control_tokens() {
    let file = metadata(&[("<|im_end|>", Control), ("<tag>", UserDefined), ("[PAD1]", Unused)], &[]);
    let tokenizer = Tokenizer::from_metadata(&file).unwrap();
    let text = "<|im_end|><tag>[PAD1]";
    assert_eq!(pieces(&tokenizer, text), "<|im_end|>·<tag>·[·P·A·D·1·]");
    let plain = tokenizer.encode(text, Encode::default());
    assert!(!plain.contains(&256) && plain.contains(&257) && !plain.contains(&258));
    assert_eq!(tokenizer.decode(&plain), text);
    assert_eq!(tokenizer.vocab().suppressed(), [258]);
    assert_eq!(tokenizer.vocab().find("[PAD1]"), None);
    assert_eq!(tokenizer.vocab().find("<tag>"), Some(257));
}

#[test]
fn spm_writes_a_space_after_special_tokens() {
    let mut table = TokenTable::new(TokenizerModel::Spm);
    table.tokens = ["<unk>", "<s>", "</s>", "\u{2581}", "a", "\u{2581}a", "<0x62>"].into_iter().collect();
    table.kinds = vec![TokenKind::Unknown, Control, Control, Normal, Normal, Normal, TokenKind::Byte];
    table.scores = vec![0.0, 0.0, 0.0, -3.0, -2.0, -1.0, 0.0];
    let tokenizer = Tokenizer::new(&table).unwrap();
    assert_eq!(pieces(&tokenizer, "a a</s>ab"), "<s>·\u{2581}a·\u{2581}a·</s>·\u{2581}a·<0x62>");
    // No token writes "c", not even its bytes.
    assert_eq!(pieces(&tokenizer, "ac"), "<s>·\u{2581}a·<unk>");
    table.add_space_prefix = Some(false);
    assert_eq!(pieces(&Tokenizer::new(&table).unwrap(), "a a"), "<s>·a·\u{2581}a");
    assert_eq!(tokenizer.vocab().special().eos, Some(2));
}

#[test]
fn how_vocabularies_differ() {
    let vocab = |extra: &[(&str, TokenKind)], bos: Option<Token>| {
        let mut file = metadata(extra, &[]);
        bos.into_iter().for_each(|id| file.insert("tokenizer.ggml.bos_token_id", id));
        Vocab::from_metadata(&file).unwrap()
    };
    let base = vocab(&[("x1", Normal), ("x2", Normal)], None);
    let same = vocab(&[("x1", Control), ("x2", Normal)], None);
    assert!(base.diff(&same).is_same());
    assert_eq!(base.digest(), same.digest());
    assert_eq!(base.digest(), 0x5996_b02a_98c7_a612, "files on disk carry digests: they must not change");

    let other_bos = vocab(&[("x1", Normal), ("x2", Normal)], Some(256));
    let diff = base.diff(&other_bos);
    assert!(diff.only_special_ids() && !diff.is_same());
    assert_eq!(diff.to_string(), "bos is none against 256");
    assert_eq!(base.digest(), other_bos.digest());

    let other = vocab(&[("x2", Normal), ("x1", Normal), ("x3", Normal)], None);
    let diff = base.diff(&other);
    assert_eq!((diff.n_vocab, diff.first_text, diff.n_text), ((258, 259), Some(256), 2));
    assert_eq!(diff.to_string(), "258 tokens against 259; 2 tokens have other texts, the first is 256");
    assert!(!diff.only_special_ids());
    let merges =
        |merges: &[&str]| Vocab::from_metadata(&metadata(&[("ab", Normal), ("bc", Normal)], merges)).unwrap();
    let check = |ours: &[&str], theirs: &[&str], expected: &str| {
        let diff = merges(ours).diff(&merges(theirs));
        assert_eq!(diff.to_string(), expected);
        let is_same = expected == "the same vocabulary";
        assert_eq!((diff.is_same(), diff.same_merges(), diff.only_special_ids()), (is_same, is_same, false));
    };
    check(&["a b", "b c"], &["a b", "b c"], "the same vocabulary");
    check(&["a b", "b c"], &["b c", "a b"], "merges differ from rank 0 on: `a b` against `b c`");
    check(&["a b"], &["a b", "b c"], "merges differ from rank 1 on: none against `b c`");
    check(&["a b"], &[], "the same vocabulary");

    // The same bytes cut elsewhere are another vocabulary.
    assert_ne!(
        vocab(&[("x", Normal), ("yz", Normal)], None).digest(),
        vocab(&[("xy", Normal), ("z", Normal)], None).digest()
    );
}

#[test]
fn a_megabyte_takes_linear_time() {
    let merges: Vec<String> = ["a a", "aa aa", "aaaa aaaa", "Ġ Ġ", "ĠĠ ĠĠ"].map(str::to_owned).to_vec();
    let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
    let extra = ["aa", "aaaa", "aaaaaaaa", "ĠĠ", "ĠĠĠĠ"].map(|text| (text, Normal));
    let tokenizer = Tokenizer::from_metadata(&metadata(&extra, &merges)).unwrap();
    let start = Instant::now();
    for unit in ["a", " ", "\n", "é", "<|"] {
        let text = unit.repeat(1 << 20);
        let tokens = tokenizer.encode(&text, PARSED);
        assert_eq!(tokenizer.decode(&tokens), text);
    }
    assert!(start.elapsed() < Duration::from_secs(15), "{:?}", start.elapsed());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_text_comes_back(text in "\\PC{0,40}|[ \\n\\ta<tg>é]{0,40}") {
        let file = metadata(&[("<tag>", UserDefined), ("ab", Normal), ("Ġa", Normal)], &["a b", "Ġ a", "Ġa b"]);
        let tokenizer = Tokenizer::from_metadata(&file).unwrap();
        prop_assert_eq!(tokenizer.decode(&tokenizer.encode(&text, PARSED)), text);
    }

    #[test]
    fn any_tables_are_read_or_refused(
        kinds in prop::collection::vec(-2..9_i32, 0..8),
        n in 0..8_usize,
        eos in any::<i32>(),
        merges in prop::collection::vec("[ ab]{0,4}", 0..4),
        model in prop::sample::select(&["gpt2", "gemma4", "llama"][..]),
        text in "[ab <é\\n]{0,12}",
    ) {
        let mut file = Metadata::for_file("m.gguf");
        file.insert("tokenizer.ggml.model", model);
        file.insert("tokenizer.ggml.tokens", ["a", "", "ab", "\n", "b", "\u{2581}", "a", "<"][..n].iter().map(|s| (*s).to_owned()).collect::<Vec<String>>());
        file.insert("tokenizer.ggml.token_type", kinds);
        file.insert("tokenizer.ggml.eos_token_id", eos);
        file.insert("tokenizer.ggml.merges", merges);
        file.insert("tokenizer.ggml.scores", vec![-1.0_f32; n]);
        match Tokenizer::from_metadata(&file) {
            Ok(tokenizer) => drop(tokenizer.encode(&text, PARSED)),
            Err(error) => prop_assert!(error.to_string().contains("tokenizer.ggml."), "{}", error),
        }
    }
}
