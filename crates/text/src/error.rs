//! What can be wrong with a tokenizer, a chat template or the data given to it.

/// An error of this crate. The caller knows the file and puts its name in front.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A metadata key that the tokenizer needs is absent.
    #[error("`{key}` is missing: {needed_for}; was the file converted without its tokenizer?")]
    MissingKey {
        /// The metadata key.
        key: &'static str,
        /// What it would have been used for.
        needed_for: &'static str,
    },
    /// A metadata key has a value that cannot be right.
    #[error("`{key}`: expected {expected}, found {found}")]
    BadKey {
        /// The metadata key.
        key: String,
        /// What a good file holds there.
        expected: String,
        /// What this file holds.
        found: String,
    },
    /// A metadata key does not have the type it should have.
    #[error(transparent)]
    Gguf(#[from] paceline_gguf::Error),
    /// A tokenizer algorithm that is not implemented.
    #[error("`tokenizer.ggml.model`: `{found}` is not supported; known are {known}")]
    UnknownModel {
        /// The name in the file.
        found: String,
        /// The names that would do.
        known: String,
    },
    /// A pre-tokenizer that is not registered.
    #[error("`tokenizer.ggml.pre`: `{found}` is not supported; known are {known}")]
    UnknownPreTokenizer {
        /// The name in the file.
        found: String,
        /// The registered names.
        known: String,
    },
    /// The chat template's own source is not valid.
    #[error("chat template does not parse{}: {message}", at(.line))]
    TemplateSyntax {
        /// Line of the template, from 1.
        line: Option<usize>,
        /// What the template engine says.
        message: String,
    },
    /// The chat template failed while it ran.
    #[error("chat template failed{}: {message}", at(.line))]
    TemplateFailed {
        /// Line of the template, from 1.
        line: Option<usize>,
        /// What the template engine says.
        message: String,
    },
    /// The chat template refused the conversation by `raise_exception`.
    #[error("chat template refused the messages{}: {message}", at(.line))]
    TemplateRaised {
        /// Line of the template, from 1.
        line: Option<usize>,
        /// The template's own words.
        message: String,
    },
    /// The messages are not of the form that chat requests have.
    #[error("messages: {0}")]
    BadMessages(String),
}

fn at(line: &Option<usize>) -> String {
    line.map(|n| format!(" at line {n}")).unwrap_or_default()
}
