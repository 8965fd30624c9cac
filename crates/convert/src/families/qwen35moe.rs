//! Qwen3.5 and its successors with a mixture of experts in place of the MLP; all else is [`super::qwen35`].

use super::Family;

pub(super) const FAMILY: Family = Family {
    arch: "qwen35moe",
    architectures: &["Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"],
    drafts: false,
    write: super::qwen35::write,
};
