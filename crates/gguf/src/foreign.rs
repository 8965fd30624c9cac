//! What a file is that is not the one we hoped for: people hand over web pages, pointers and archives.

/// (how it starts, what it is, the way out)
type Magic = (&'static [u8], &'static str, &'static str);

const OTHER_FILE: &str = "give the path of a model file";
const OLD_GGML: &str = "this format ended in 2023: download the model as GGUF";
const UNPACK: &str = "unpack it first";

const MAGICS: &[Magic] = &[
    (b"lmgg", "an old ggml file", OLD_GGML),
    (b"fmgg", "an old ggmf file", OLD_GGML),
    (b"tjgg", "an old ggjt file", OLD_GGML),
    (b"algg", "an old ggla adapter", OLD_GGML),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to", "run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive (a PyTorch checkpoint?)", "convert the model, or download it as GGUF"),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint?)", "convert the model, or download it as GGUF"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", OTHER_FILE),
    (b"\xff\xd8\xff", "a JPEG image", OTHER_FILE),
    (b"%PDF", "a PDF document", OTHER_FILE),
    (b"\x7fELF", "a program or library (ELF)", OTHER_FILE),
    (b"MZ", "a Windows program", OTHER_FILE),
    (b"\x1f\x8b", "a gzip archive", UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"GGUF", "a GGUF file", "give it where a GGUF file is expected"),
];

/// What `bytes` look like and the way out.
pub(crate) fn identify(bytes: &[u8]) -> (String, &'static str) {
    if let Some((_, what, hint)) = MAGICS.iter().find(|(magic, ..)| bytes.starts_with(magic)) {
        return (what.to_string(), hint);
    }
    if bytes.is_empty() {
        return ("an empty file".into(), "download or convert it again");
    }
    let text = bytes.trim_ascii_start();
    let starts =
        |tag: &str| text.get(..tag.len()).is_some_and(|start| start.eq_ignore_ascii_case(tag.as_bytes()));
    if starts("<!doctype") || starts("<html") {
        let hint =
            "the link answered with a web page: it may want a login, or is not the direct link to the file";
        return ("an HTML page".into(), hint);
    }
    if starts("<?xml") {
        return ("an XML document".into(), "the link answered with a message: open the file to read it");
    }
    if bytes.len() > 8 && bytes[8] == b'{' && bytes[4..8] == [0; 4] {
        return ("a safetensors file".into(), "convert it with `paceline convert`");
    }
    if starts("{") || starts("[") {
        return ("a JSON document".into(), OTHER_FILE);
    }
    let start = &bytes[..bytes.len().min(8)];
    if start.iter().all(|&byte| byte == 0) {
        return ("zero bytes at its start".into(), "an unfinished download? fetch it again");
    }
    (format!("a file that starts with \"{}\"", start.escape_ascii()), OTHER_FILE)
}
