//! What can't be converted, and the message that each earns. Nothing is written before the fault is found.

mod edited;

use edited::{Edited, edited, golden};
use paceline_gguf::safetensors::DType;
use serde_json::{Value, json};

/// The conversion fails with a message that has all these parts, and leaves no file.
#[track_caller]
fn check(edited: Edited, parts: &[&str]) {
    let message = match edited.convert() {
        Err(error) => error.to_string(),
        Ok(report) => panic!("converted: {report:?}"),
    };
    for part in parts {
        assert!(message.contains(part), "no {part:?} in: {message}");
    }
    assert_eq!(edited.beside(), ["hf"], "something was left behind");
}

#[test]
fn directories_that_are_no_models() {
    check(edited("qwen3").remove("config.json"), &["expected `config.json`, found none; give the directory"]);
    check(edited("qwen3").write("config.json", "{"), &["config.json: expected JSON", "the file is damaged"]);
    check(edited("qwen3").write("config.json", "[]"), &["expected a JSON object"]);
    check(edited("qwen3").remove("tokenizer.json"), &["expected `tokenizer.json`", "copy it from"]);
    check(edited("qwen3").remove("model.safetensors"), &["safetensors"]);
    check(
        edited("qwen3").options(|options| options.ty = "q9_0".into()),
        &["type `q9_0` is unknown; known: f32"],
    );
    check(
        edited("qwen3").set("architectures", json!(["MambaForCausalLM"])),
        &[
            "`architectures`: `MambaForCausalLM` can't be converted; supported: Qwen3_5ForCausalLM, ",
            "Qwen3ForCausalLM, Qwen3MoeForCausalLM, LlamaForCausalLM, DFlashDraftModel",
        ],
    );
    check(edited("qwen3").set("architectures", Value::Null), &["a checkpoint that names none"]);
    check(
        edited("qwen3").set("quantization_config", json!({"quant_method": "fp8"})),
        &["`quantization_config`: expected weights that are plain floats", "convert the original in BF16"],
    );
    let with_target =
        |options: &mut paceline_convert::ConvertOptions| options.target_dir = Some(golden("qwen35"));
    check(edited("qwen3").options(with_target), &["expected a drafter, as a target is given"]);
}

#[test]
fn configs_that_make_no_sense() {
    check(edited("qwen3").set("hidden_size", "big"), &["config.json: `hidden_size`", "found \"big\""]);
    check(edited("qwen3").set("hidden_size", 0), &["`hidden_size`: expected a positive integer"]);
    check(edited("qwen3").set("hidden_size", 1u64 << 40), &["below 2^31, found 1099511627776"]);
    check(
        edited("qwen3").set("num_hidden_layers", Value::Null),
        &["`num_hidden_layers`: expected a positive integer"],
    );
    check(edited("qwen3").set("num_key_value_heads", 4), &["expected a divisor of 6", "found 4"]);
    check(
        edited("qwen3moe").set("num_experts_per_tok", 8),
        &["`num_experts_per_tok`: expected at most 7 (num_local_experts), found 8"],
    );
    let unnormed = "`norm_topk_prob`: expected weights of experts that add up to 1";
    check(edited("qwen3moe").set("norm_topk_prob", false), &[unnormed, "found false"]);
    check(edited("qwen3moe").set("norm_topk_prob", Value::Null), &[unnormed]);
    check(edited("qwen3next").set("norm_topk_prob", false), &[unnormed]);
    let lost = "model.layers.2.mlp.experts.6.up_proj.weight";
    check(
        edited("qwen3moe").tensors(|tensors| tensors.retain(|(name, ..)| name != lost)),
        &[lost, "expected shape [28, 48], found no such tensor"],
    );
    check(edited("qwen3moe").set("num_local_experts", 6), &["tensor `model.layers.0.mlp.gate.weight`"]);
    check(edited("qwen3").set("hidden_act", "gelu"), &["`hidden_act`: expected `silu`, found \"gelu\""]);
    check(
        edited("qwen3").config(|config| config["rope_parameters"]["rope_type"] = "longrope".into()),
        &["`rope_parameters.rope_type`: expected one of default, linear, yarn, found \"longrope\""],
    );
    check(
        edited("qwen35").config(|config| config["rope_parameters"]["partial_rotary_factor"] = 0.3.into()),
        &["an even number of the 12 dimensions"],
    );
    check(
        edited("qwen35").set("linear_num_value_heads", 5),
        &["expected a multiple of 2 (linear_num_key_heads)"],
    );
    check(
        edited("qwen35").set("linear_value_head_dim", 20),
        &["expected 10 (linear_key_head_dim), found 20"],
    );
    check(
        edited("qwen35").set("layer_types", json!(["full_attention"])),
        &["expected 7 times `linear_attention`"],
    );
    check(edited("qwen35").set("attn_output_gate", false), &["`attn_output_gate`", "not supported yet"]);
    check(
        edited("llama").config(|config| config["rope_parameters"]["high_freq_factor"] = 0.5.into()),
        &["expected more than 1 (low_freq_factor), found 0.5"],
    );
}

#[test]
fn tensors_that_are_not_what_the_config_says() {
    check(
        edited("qwen3").set("intermediate_size", 73),
        &["tensor `model.layers.0.mlp.gate_proj.weight`: expected shape [73, 56], found shape [72, 56]"],
    );
    check(
        edited("qwen3").set("num_hidden_layers", 5),
        &["tensor `model.layers.4.input_layernorm.weight`: expected shape [56], found no such tensor"],
    );
    check(
        edited("qwen3").set("num_hidden_layers", 3),
        &["11 tensors are no part of a qwen3 model", "`model.layers.3.input_layernorm.weight`"],
    );
    check(
        edited("qwen3").add("model.layers.1.self_attn.q_proj.bias", &[120]),
        &["1 tensors are no part", "first `model.layers.1.self_attn.q_proj.bias`"],
    );
    let integers = |tensors: &mut Vec<edited::Tensor>| {
        let norm = tensors.iter_mut().find(|(name, ..)| name == "model.norm.weight").unwrap();
        norm.2 = DType::I32;
    };
    check(edited("qwen3").tensors(integers), &["`model.norm.weight`: expected floats", "found I32"]);
}

#[test]
fn tokenizers_that_gguf_cannot_express() {
    let tokenizer = |edit: fn(&mut Value)| edited("qwen3").json("tokenizer.json", edit);
    check(
        tokenizer(|json| json["model"]["type"] = "Unigram".into()),
        &["expected a BPE model, found `Unigram`", "published GGUF"],
    );
    check(tokenizer(|json| json["model"]["byte_fallback"] = true.into()), &["found BPE with byte fallback"]);
    check(
        tokenizer(|json| json["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+".into()),
        &[
            "expected the pattern of qwen2, qwen35, llama-bpe, found the pattern \\w+",
            "name that one as pre-tokenizer",
        ],
    );
    check(tokenizer(|json| json["pre_tokenizer"] = Value::Null), &["found no pattern"]);
    check(tokenizer(|json| json["model"]["vocab"]["!"] = 500.into()), &["ids below 121", "id 500 for `!`"]);
    check(
        tokenizer(|json| json["model"]["vocab"]["!"] = 1.into()),
        &["expected one token for each id", "with id 1"],
    );
    check(
        tokenizer(|json| json["model"]["merges"][0] = json!(["a b", "c"])),
        &["merges of two byte-level texts"],
    );
    let pre = |options: &mut paceline_convert::ConvertOptions| options.pre_tokenizer = Some("gpt5".into());
    check(
        edited("qwen3").options(pre),
        &["expected one of qwen2, qwen35, llama-bpe as pre-tokenizer, found `gpt5`"],
    );
    check(
        edited("qwen3").json("tokenizer_config.json", |json| json["eos_token"] = "<eos>".into()),
        &["`eos_token`: expected the text of a token, found \"<eos>\""],
    );
    check(
        edited("qwen3").json("generation_config.json", |json| json["eos_token_id"] = json!([110, 121])),
        &["`eos_token_id`: expected ids below 121, found [110,121]"],
    );
}

#[test]
fn drafters_of_other_kinds() {
    let drafter = |edit: fn(&mut Value)| edited("dflash").config(edit);
    let architecture = |name| edited("dflash").set("architectures", json!([name]));
    check(architecture("DSparkDraftModel"), &["`DSparkDraftModel` can't be converted"]);
    let size = |key: &str| format!("`dflash_config.{key}`: expected a positive integer, found nothing");
    check(architecture("DFlash2DraftModel"), &[&size("conv_kernel_size")]);
    // Any of its sizes announces version 2, whatever the architecture is called.
    for key in ["conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"] {
        let without = edited("dflash2")
            .set("architectures", json!(["DFlashDraftModel"]))
            .config(|json| json["dflash_config"][key] = Value::Null);
        check(without, &[&size(key).replace("nothing", "null")]);
    }
    let version2 = |edit: fn(&mut Value)| edited("dflash2").config(edit);
    check(
        version2(|json| json["dflash_config"]["conv_group_size"] = 7.into()),
        &["`dflash_config.conv_group_size`: expected a divisor of 40 (hidden_size), found 7"],
    );
    check(
        version2(|json| json["dflash_config"]["conv_kernel_size"] = 1.into()),
        &["`dflash_config.conv_kernel_size`: expected 2 rows or more, found 1"],
    );
    check(
        version2(|json| json["dflash_config"]["selector_rank"] = 5.into()),
        &["tensor `candidate_selector.predecessor_codebook", "expected shape [131, 5], found shape [131, 6]"],
    );
    let lost = "layers.1.mlp_conv.kernel_projection.weight";
    check(
        edited("dflash2").tensors(|tensors| tensors.retain(|(name, ..)| name != lost)),
        &[lost, "expected shape [48, 40], found no such tensor"],
    );
    check(
        drafter(|json| json["dflash_config"]["target_layer_ids"] = Value::Null),
        &["`dflash_config.target_layer_ids`: expected increasing layers"],
    );
    check(drafter(|json| json["dflash_config"]["target_layer_ids"] = json!([3, 1, 6])), &["found [3,1,6]"]);
    check(drafter(|json| json["dflash_config"]["target_layer_ids"] = json!([1, 3, 7])), &["each below 7"]);
    check(
        drafter(|json| json["dflash_config"]["target_layer_ids"] = json!([1, 3])),
        &["tensor `fc.weight`: expected shape [40, 80], found shape [40, 120]"],
    );
    check(
        drafter(|json| json["dflash_config"]["mask_token_id"] = 131.into()),
        &["an id below 131 (vocab_size)", "found 131"],
    );
    check(
        drafter(|json| json["dflash_config"]["attention_sink_bias"] = true.into()),
        &["without it", "found true"],
    );
    check(drafter(|json| json["block_size"] = Value::Null), &["`block_size`"]);
    check(drafter(|json| json["sliding_window"] = Value::Null), &["`sliding_window`: expected the window"]);
    check(edited("dflash").write("mask_embedding.pt", ""), &["no `mask_embedding.pt`"]);
    check(
        edited("dflash").add("layers.0.attention_conv.base_kernel", &[2, 2, 40]),
        &["no part of a dflash model"],
    );
}

#[test]
fn pairs_that_do_not_fit() {
    let target = |edit: fn(&mut Value), name: &str| {
        let path = golden(name);
        edited("dflash").config(edit).options(|options| options.target_dir = Some(path))
    };
    check(
        target(|_| {}, "qwen35-tied"),
        &["does not fit", "layers: the drafter expects more than 6", "the target has 5"],
    );
    check(target(|json| json["num_target_layers"] = 9.into(), "qwen35"), &["expects 9, the target has 7"]);
    check(target(|json| json["target_hidden_size"] = 48.into(), "qwen35"), &["size of a hidden state"]);
    check(
        target(|json| json["vocab_size"] = 140.into(), "qwen35"),
        &["vocabulary: the drafter expects 140, the target has 131"],
    );
}

#[test]
fn gemmas_that_differ() {
    check(
        edited("gemma4").set("hidden_activation", "silu"),
        &["`hidden_activation`: expected `gelu_pytorch_tanh`"],
    );
    check(edited("gemma4").set("attention_bias", true), &["`attention_bias`", "not supported yet"]);
    check(
        edited("gemma4").set("use_bidirectional_attention", "all"),
        &["`use_bidirectional_attention`: expected a text model that looks back only"],
    );
    check(edited("gemma4").set("layer_types", json!(["full_attention"])), &["expected 5 times"]);
    check(
        edited("gemma4").config(|config| config["per_layer_config"]["2"]["head_dim"] = 16.into()),
        &["`per_layer_config`: expected one head_dim for all layers of a kind"],
    );
    check(
        edited("gemma4").config(|config| config["per_layer_config"]["2"]["num_key_value_heads"] = 4.into()),
        &["for layer 2 an even head_dim, and KV heads that divide 6"],
    );
    check(edited("gemma4-e").set("num_kv_shared_layers", 10), &["expected less than 10 layers"]);
    check(edited("gemma4-e").set("vocab_size_per_layer_input", 99), &["as many as vocab_size"]);
    check(
        edited("gemma4").config(|config| {
            config["rope_parameters"]["full_attention"]["rope_type"] = "yarn".into();
        }),
        &["`rope_parameters.full_attention.rope_type`: expected `proportional` or `default`, found \"yarn\""],
    );
}

#[test]
fn assistants_that_differ() {
    let assistant = |edit: fn(&mut Value)| edited("gemma4-e-assistant").config(edit);
    check(
        assistant(|json| json["backbone_hidden_size"] = Value::Null),
        &["`backbone_hidden_size`: expected"],
    );
    check(
        assistant(|json| json["backbone_hidden_size"] = 44.into()),
        &["tensor `pre_projection.weight`: expected shape [28, 88]", "found shape [28, 80]"],
    );
    check(
        assistant(|json| json["num_centroids"] = 8.into()),
        &["`num_centroids`: expected a divisor of 133"],
    );
    check(assistant(|json| json["centroid_intermediate_top_k"] = 9.into()), &["expected at most 7 groups"]);
    check(
        assistant(|json| json["text_config"]["enable_moe_block"] = true.into()),
        &["`text_config.", "not supported yet"],
    );
    // What the flag says is not there must not be there.
    check(
        assistant(|json| json["use_ordered_embeddings"] = false.into()),
        &["`masked_embedding.", "no part of a gemma4-assistant model"],
    );
    let floats = edited("gemma4-e-assistant").tensors(|tensors| {
        let (.., dtype, _) = tensors.iter_mut().find(|t| t.0 == "masked_embedding.token_ordering").unwrap();
        *dtype = DType::F64;
    });
    check(
        floats,
        &["`masked_embedding.token_ordering`: expected whole numbers of 32 bits, found F64 values"],
    );
    let path = golden("gemma4-e");
    let other = edited("gemma4-assistant").options(|options| options.target_dir = Some(path));
    check(other, &["size of a hidden state: the drafter expects 44, the target has 40"]);
}
