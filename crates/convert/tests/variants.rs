//! The forms in which checkpoints come: nested, with parts that are left out, with other tokenizer files.

mod edited;

use edited::{edited, golden};
use paceline_gguf::safetensors::SafeTensors;
use serde_json::{Value, json};

#[test]
fn a_multimodal_checkpoint_gives_its_text_model() {
    let nested = |config: &mut Value| {
        let text = config.take();
        *config = json!({
            "architectures": ["Qwen3_5ForConditionalGeneration"],
            "tie_word_embeddings": false,
            "text_config": text,
            "vision_config": {},
        });
        let text = config["text_config"].as_object_mut().unwrap();
        text.remove("architectures");
        text.remove("tie_word_embeddings");
    };
    let model = edited("qwen35")
        .config(nested)
        .rename(|name| name.replace("model.", "model.language_model."))
        .add("model.visual.blocks.0.norm1.weight", &[4]);
    let report = model.convert().unwrap();
    let skipped: Vec<_> =
        report.skipped.iter().map(|skipped| (skipped.tensor.as_str(), skipped.reason)).collect();
    assert_eq!(skipped, [("model.visual.blocks.0.norm1.weight", "not part of the text model")]);
    // Apart from its name, the file is the one of the text-only checkpoint.
    let (nested, plain) = (model.file(), edited("qwen35").file());
    assert_eq!(nested.metadata(), plain.metadata());
    for (a, b) in nested.tensors().iter().zip(plain.tensors()) {
        assert!(a.name == b.name && nested.data(a) == plain.data(b), "{}", a.name);
    }
}

#[test]
fn a_prediction_head_becomes_one_more_block() {
    let file = edited("qwen35-mtp").file();
    let metadata = file.metadata();
    assert_eq!(metadata.u32("qwen35.block_count").unwrap(), Some(5));
    assert_eq!(metadata.u32("qwen35.nextn_predict_layers").unwrap(), Some(1));
    let values = |name: &str| -> Vec<f32> {
        let tensor = file.tensor(name).unwrap_or_else(|| panic!("{name}"));
        file.data(tensor).as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect()
    };
    let original = SafeTensors::open_file(golden("qwen35-mtp").join("model.safetensors")).unwrap();
    for (name, tensor, add) in [
        ("nextn.eh_proj", "fc", 0.0),
        ("nextn.enorm", "pre_fc_norm_embedding", 1.0),
        ("nextn.hnorm", "pre_fc_norm_hidden", 1.0),
        ("nextn.shared_head_norm", "norm", 1.0),
        ("attn_norm", "layers.0.input_layernorm", 1.0),
        ("post_attention_norm", "layers.0.post_attention_layernorm", 1.0),
        ("attn_q", "layers.0.self_attn.q_proj", 0.0),
        ("attn_q_norm", "layers.0.self_attn.q_norm", 1.0),
        ("ffn_down", "layers.0.mlp.down_proj", 0.0),
    ] {
        let mut want = original.to_f32(&format!("mtp.{tensor}.weight")).unwrap();
        want.iter_mut().for_each(|x| *x += add);
        assert_eq!(values(&format!("blk.4.{name}.weight")), want, "{name}");
    }
    // Saved again without its head, the checkpoint says so in the config alone.
    let without = edited("qwen35-mtp").tensors(|tensors| tensors.retain(|t| !t.0.starts_with("mtp."))).file();
    assert_eq!(without.metadata().u32("qwen35.block_count").unwrap(), Some(4));
    assert!(!without.metadata().contains("qwen35.nextn_predict_layers"));
    let several = edited("qwen35-mtp").set("mtp_num_hidden_layers", json!(2));
    let report = several.convert().unwrap();
    assert_eq!(report.skipped.len(), 15, "{:?}", report.skipped);
    assert!(report.skipped[0].reason.contains("several layers"));
}

#[test]
fn a_head_that_is_tied_and_stored_is_left_out() {
    let model = edited("qwen35-tied").add("lm_head.weight", &[119, 40]);
    let report = model.convert().unwrap();
    assert_eq!(report.skipped[0].tensor, "lm_head.weight");
    assert!(model.file().tensor("output.weight").is_none());
}

#[test]
fn layers_without_an_interval_are_listed() {
    let kinds = |config: &mut Value| {
        let kinds = config["layer_types"].as_array_mut().unwrap();
        kinds.rotate_right(1);
    };
    // The layers' tensors move with their kinds: 0 1 2 3 4 5 6 become 1 2 3 4 5 6 0.
    let rotate = |name: &str| {
        let Some(rest) = name.strip_prefix("model.layers.") else { return name.to_string() };
        let (il, rest) = rest.split_once('.').unwrap();
        format!("model.layers.{}.{rest}", (il.parse::<usize>().unwrap() + 1) % 7)
    };
    let file = edited("qwen35").config(kinds).rename(rotate).file();
    let linear = file.metadata().bool_array("qwen35.attention.recurrent_layers").unwrap().unwrap();
    assert_eq!(linear, [true, true, true, false, true, true, false]);
    assert!(!file.metadata().contains("qwen35.full_attention_interval"));
}

#[test]
fn long_context_scalings_become_keys() {
    let yarn = json!({"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128});
    let file = edited("qwen3").set("rope_parameters", yarn.clone()).file();
    let metadata = file.metadata();
    assert_eq!(metadata.str("qwen3.rope.scaling.type").unwrap(), Some("yarn"));
    assert_eq!(metadata.f32("qwen3.rope.scaling.factor").unwrap(), Some(4.0));
    assert_eq!(metadata.u32("qwen3.rope.scaling.original_context_length").unwrap(), Some(128));
    // Older configs: the base at the top, the kind as `type`.
    let older = edited("qwen3").config(|config| {
        config["rope_parameters"] = Value::Null;
        config["rope_theta"] = 5e5.into();
        config["rope_scaling"] = json!({"type": "linear", "factor": 2.0});
    });
    let file = older.file();
    assert_eq!(file.metadata().f32("qwen3.rope.freq_base").unwrap(), Some(5e5));
    assert_eq!(file.metadata().str("qwen3.rope.scaling.type").unwrap(), Some("linear"));
}

/// Stacks the experts of a layer as newer checkpoints have them: gate and up in one tensor.
fn fuse_experts(tensors: &mut Vec<edited::Tensor>) {
    let take = |tensors: &mut Vec<edited::Tensor>, name: &str| {
        let at = tensors.iter().position(|(n, ..)| n == name)?;
        Some(tensors.remove(at))
    };
    for il in 0.. {
        let name = |e: usize, part: &str| format!("model.layers.{il}.mlp.experts.{e}.{part}_proj.weight");
        let (mut gate_up, mut down, mut n_expert) = (Vec::new(), Vec::new(), 0);
        let (mut n_embd, mut n_ff) = (0, 0);
        while let Some((_, shape, _, data)) = take(tensors, &name(n_expert, "gate")) {
            [n_ff, n_embd] = shape[..].try_into().unwrap();
            gate_up.extend(data);
            gate_up.extend(take(tensors, &name(n_expert, "up")).unwrap().3);
            down.extend(take(tensors, &name(n_expert, "down")).unwrap().3);
            n_expert += 1;
        }
        if n_expert == 0 {
            break;
        }
        let (n, f32) = (n_expert as u64, paceline_gguf::safetensors::DType::F32);
        let experts = format!("model.layers.{il}.mlp.experts.");
        tensors.push((format!("{experts}gate_up_proj"), vec![n, 2 * n_ff, n_embd], f32, gate_up));
        tensors.push((format!("{experts}down_proj"), vec![n, n_embd, n_ff], f32, down));
    }
}

#[test]
fn experts_that_are_stacked_already_make_the_same_file() {
    for name in ["qwen3moe", "qwen35moe", "qwen3next"] {
        let (stacked, plain) = (edited(name).tensors(fuse_experts).file(), edited(name).file());
        assert_eq!(stacked.metadata(), plain.metadata());
        assert_eq!(stacked.tensors().len(), plain.tensors().len());
        for (a, b) in stacked.tensors().iter().zip(plain.tensors()) {
            assert!(a.name == b.name && stacked.data(a) == plain.data(b), "{name}: {}", a.name);
        }
    }
}

#[test]
fn experts_are_quantised_where_their_rows_are_whole_blocks() {
    // Down projections of 28 inputs fit no block: the converter keeps them at a wider type.
    let model = edited("qwen3moe").options(|options| options.ty = "bf16".into());
    let file = model.file();
    for (name, ty) in [("ffn_gate_inp", "f32"), ("ffn_up_exps", "bf16"), ("ffn_down_exps", "bf16")] {
        assert_eq!(file.tensor(&format!("blk.0.{name}.weight")).unwrap().ty.name(), ty, "{name}");
    }
}

#[test]
fn a_layer_may_have_an_mlp_among_experts() {
    let mlp = |name: &str| format!("model.layers.1.mlp.{name}_proj.weight");
    let model = edited("qwen3moe")
        .set("mlp_only_layers", json!([1]))
        .tensors(|tensors| tensors.retain(|(name, ..)| !name.starts_with("model.layers.1.mlp.")))
        .add(&mlp("gate"), &[64, 48])
        .add(&mlp("up"), &[64, 48])
        .add(&mlp("down"), &[48, 64]);
    let file = model.file();
    assert!(
        file.tensor("blk.1.ffn_gate.weight").is_some() && file.tensor("blk.1.ffn_gate_inp.weight").is_none()
    );
    assert!(
        file.tensor("blk.0.ffn_gate.weight").is_none() && file.tensor("blk.0.ffn_gate_inp.weight").is_some()
    );
}

#[test]
fn biases_of_llama_move_with_their_rows() {
    let bias: Vec<u8> = (0..72).flat_map(|i| (i as f32).to_le_bytes()).collect();
    let model = edited("llama").tensors(|tensors| {
        let name = "model.layers.2.self_attn.q_proj.bias".to_string();
        tensors.push((name, vec![72], paceline_gguf::safetensors::DType::F32, bias));
    });
    let file = model.file();
    let data = file.data(file.tensor("blk.2.attn_q.bias").unwrap());
    let values: Vec<f32> = data.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
    assert_eq!(values[..6], [0.0, 6.0, 1.0, 7.0, 2.0, 8.0]);
    assert_eq!(values[12..15], [12.0, 18.0, 13.0]);
}

#[test]
fn the_tokenizer_can_be_told_its_name() {
    let model = edited("qwen3")
        .json("tokenizer.json", |json| json["pre_tokenizer"] = Value::Null)
        .options(|options| options.pre_tokenizer = Some("qwen35".into()));
    assert_eq!(model.file().metadata().str("tokenizer.ggml.pre").unwrap(), Some("qwen35"));
}

#[test]
fn ends_and_settings_come_from_the_generation_config() {
    let settings = |json: &mut Value| {
        *json = json!({
            "eos_token_id": [110, 108, 7], "suppress_tokens": [3],
            "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": null,
        });
    };
    let model = edited("qwen3").json("generation_config.json", settings);
    let report = model.convert().unwrap();
    assert_eq!(report.notes.len(), 1, "{:?}", report.notes);
    assert!(report.notes[0].starts_with("token 7 `(` ends a generation"), "{}", report.notes[0]);
    let file = model.file();
    let metadata = file.metadata();
    assert_eq!(metadata.u32("tokenizer.ggml.eos_token_id").unwrap(), Some(110));
    assert_eq!(metadata.i32_array("tokenizer.ggml.suppress_tokens").unwrap(), Some(vec![3]));
    assert_eq!(metadata.f32("general.sampling.temp").unwrap(), Some(0.6));
    assert_eq!(metadata.i32("general.sampling.top_k").unwrap(), Some(20));
    assert_eq!(metadata.f32("general.sampling.top_p").unwrap(), Some(0.95));
    assert!(!metadata.contains("general.sampling.min_p"));
}

#[test]
fn a_begin_token_is_found_in_the_post_processor() {
    let without = |json: &mut Value| json["add_bos_token"] = Value::Null;
    let add_bos =
        |model: edited::Edited| model.file().metadata().bool("tokenizer.ggml.add_bos_token").unwrap();
    assert_eq!(add_bos(edited("llama").json("tokenizer_config.json", without)), Some(false));
    let template = |json: &mut Value| {
        let single =
            json!([{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}}, {"Sequence": {"id": "A"}}]);
        let steps = json!([{"type": "ByteLevel"}, {"type": "TemplateProcessing", "single": single}]);
        json["post_processor"] = json!({"type": "Sequence", "processors": steps});
    };
    let model = edited("llama").json("tokenizer_config.json", without).json("tokenizer.json", template);
    assert_eq!(add_bos(model), Some(true));
}

#[test]
fn templates_come_alone_or_with_names() {
    let several = |json: &mut Value| {
        json["chat_template"] = json!([
            {"name": "default", "template": "A"},
            {"name": "tool_use", "template": "B"},
        ]);
    };
    let file = edited("qwen3").json("tokenizer_config.json", several).file();
    let metadata = file.metadata();
    assert_eq!(metadata.str("tokenizer.chat_template").unwrap(), Some("A"));
    assert_eq!(metadata.str("tokenizer.chat_template.tool_use").unwrap(), Some("B"));
    assert_eq!(&metadata.require_bytes_array("tokenizer.chat_templates").unwrap()[0], b"tool_use");
    let file = edited("qwen3").write("chat_template.jinja", "C").file();
    assert_eq!(file.metadata().str("tokenizer.chat_template").unwrap(), Some("C"));
}

#[test]
fn drafters_choose_windows_and_causality() {
    let check =
        |edit: fn(&mut Value), pattern: Option<[bool; 3]>, window: Option<u32>, causal: Option<bool>| {
            let file = edited("dflash").config(edit).file();
            let metadata = file.metadata();
            let found = metadata.bool_array("dflash.attention.sliding_window_pattern").unwrap();
            assert_eq!(found, pattern.map(Vec::from));
            assert_eq!(metadata.u32("dflash.attention.sliding_window").unwrap(), window);
            assert_eq!(metadata.bool("dflash.attention.causal").unwrap(), causal);
        };
    let mixed = Some([true, false, true]);
    check(|_| {}, mixed, Some(8), None);
    check(|json| json["is_causal"] = true.into(), mixed, Some(8), Some(true));
    check(|json| json["dflash_config"]["causal"] = false.into(), mixed, Some(8), Some(false));
    check(
        |json| {
            json["is_causal"] = true.into();
            json["dflash_config"]["causal"] = false.into();
        },
        mixed,
        Some(8),
        Some(true),
    );
    check(|json| json["layer_types"] = Value::Null, None, None, None);
    check(
        |json| json["layer_types"] = json!(["full_attention", "full_attention", "full_attention"]),
        None,
        None,
        None,
    );
    let swa = |json: &mut Value| {
        json["layer_types"] = Value::Null;
        json["dflash_config"]["use_swa"] = true.into();
        json["dflash_config"]["swa_window_size"] = 16.into();
    };
    check(swa, Some([true; 3]), Some(16), Some(false));
}

#[test]
fn drafters_come_in_other_layouts() {
    // The block size in the section, names with a prefix, an embedding and a head of its own, scalars.
    let model = edited("dflash")
        .config(|json| {
            json["dflash_config"]["block_size"] = 4.into();
            json["dflash_config"]["final_logit_softcapping"] = 30.0.into();
        })
        .rename(|name| format!("model.{name}"))
        .add("model.embed_tokens.weight", &[131, 40])
        .add("lm_head.weight", &[131, 40])
        .options(|options| options.target_dir = Some(golden("qwen35")));
    let file = model.file();
    assert_eq!(file.metadata().u32("dflash.block_size").unwrap(), Some(4));
    assert_eq!(file.metadata().f32("dflash.final_logit_softcapping").unwrap(), Some(30.0));
    for name in ["fc.weight", "token_embd.weight", "output.weight", "blk.2.ffn_up.weight"] {
        assert!(file.tensor(name).is_some(), "{name}");
    }
}

#[test]
fn an_older_file_stays_until_the_new_one_is_whole() {
    let model = edited("qwen3");
    std::fs::write(&model.options.out, "older").unwrap();
    let model = model.set("intermediate_size", 73);
    assert!(model.convert().is_err());
    assert_eq!(std::fs::read(&model.options.out).unwrap(), b"older");
    let model = model.set("intermediate_size", 72);
    assert_eq!(model.file().metadata().str("general.architecture").unwrap(), Some("qwen3"));
}

/// Older configs name the sizes of full layers beside those of the others.
#[test]
fn gemma_sizes_in_both_spellings() {
    let new = edited("gemma4");
    let old = edited("gemma4").config(|config| {
        config.as_object_mut().unwrap().remove("per_layer_config");
        config["global_head_dim"] = 20.into();
        config["num_global_key_value_heads"] = 2.into();
    });
    let padded = edited("gemma4").config(|config| {
        let own = config["per_layer_config"].take();
        config["per_layer_config"] = serde_json::json!({"02": own["2"], "04": own["4"]});
    });
    let [new, old, padded] = [new, old, padded].map(|edited| {
        edited.convert().unwrap();
        std::fs::read(&edited.options.out).unwrap()
    });
    assert!(new == old, "per_layer_config and global_head_dim differ");
    assert!(new == padded, "2 and 02 differ");
}
