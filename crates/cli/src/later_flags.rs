//! Flags of llama-server whose feature is not built yet, or that this design has no use for.
//!
//! None is ignored in silence: where going on without it is harmless a line says what happens instead, where it would
//! change the answers the start is refused. A flag whose wish is granted anyway says nothing.

use anyhow::{Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Args, Command, Error, FromArgMatches};

use crate::flags::switch;

struct Later {
    name: &'static str,
    aliases: &'static [&'static str],
    env: Option<&'static str>,
    takes: Takes,
    /// Values that ask for what happens anyway.
    quiet: &'static [&'static str],
    instead: Instead,
}

#[derive(Clone, Copy, PartialEq)]
enum Takes {
    Nothing,
    Value,
    Optional,
}

#[derive(Clone, Copy)]
enum Instead {
    /// What happens is what was asked for.
    AsAsked,
    /// What happens instead, harmless.
    Warn(&'static str),
    /// Why it can't be.
    Refuse(&'static str),
}

use Instead::{AsAsked, Refuse, Warn};
use Takes::{Nothing, Optional, Value};

const fn later(name: &'static str, takes: Takes, instead: Instead) -> Later {
    Later { name, aliases: &[], env: None, takes, quiet: &[], instead }
}

impl Later {
    const fn also(mut self, aliases: &'static [&'static str]) -> Later {
        self.aliases = aliases;
        self
    }

    const fn env(mut self, name: &'static str) -> Later {
        self.env = Some(name);
        self
    }

    const fn quiet(mut self, values: &'static [&'static str]) -> Later {
        self.quiet = values;
        self
    }
}

const ON_CPU: Instead = Warn("this build computes on the CPU, where all layers stay");
const SHIFTED: Instead = Refuse(
    "a cached part behind a difference was computed with other tokens before it, so answers would depend on what was asked before; equal beginnings are always reused",
);
const WHOLE_CONTEXT: Instead = Warn("the drafter sees the whole context; the text is the same");
const NO_POOLS: Instead = Warn("all threads work on every step; -t sets their number");
const ROUTER: Instead = Refuse("serving several models from one port is not built yet");

const LATER: &[Later] = &[
    later("n-gpu-layers", Value, ON_CPU)
        .also(&["ngl", "gpu-layers"])
        .env("LLAMA_ARG_N_GPU_LAYERS")
        .quiet(&["0", "auto"]),
    later("spec-draft-ngl", Value, ON_CPU)
        .also(&["ngld", "gpu-layers-draft", "n-gpu-layers-draft"])
        .env("LLAMA_ARG_N_GPU_LAYERS_DRAFT")
        .quiet(&["0", "auto"]),
    later("device", Value, ON_CPU).also(&["dev"]).env("LLAMA_ARG_DEVICE").quiet(&["none", "cpu", "CPU"]),
    later("spec-draft-device", Value, ON_CPU).also(&["devd", "device-draft"]).quiet(&["none", "cpu", "CPU"]),
    later("override-tensor", Value, ON_CPU).also(&["ot"]).env("LLAMA_ARG_OVERRIDE_TENSOR"),
    later("override-tensor-draft", Value, ON_CPU).also(&["otd", "spec-draft-override-tensor"]),
    later("cpu-moe", Nothing, AsAsked).also(&["cmoe"]),
    later("n-cpu-moe", Value, AsAsked).also(&["ncmoe"]),
    later("split-mode", Value, ON_CPU).also(&["sm"]).env("LLAMA_ARG_SPLIT_MODE").quiet(&["none"]),
    later("tensor-split", Value, ON_CPU).also(&["ts"]).env("LLAMA_ARG_TENSOR_SPLIT"),
    later("main-gpu", Value, ON_CPU).also(&["mg"]).env("LLAMA_ARG_MAIN_GPU"),
    later("fit", Optional, AsAsked).env("LLAMA_ARG_FIT"),
    later("flash-attn", Optional, Warn("attention is computed in one way only; the result is the same"))
        .also(&["fa"])
        .env("LLAMA_ARG_FLASH_ATTN")
        .quiet(&["on", "auto", "1", "true"]),
    later("cont-batching", Nothing, AsAsked).also(&["cb"]).env("LLAMA_ARG_CONT_BATCHING"),
    later("no-cont-batching", Nothing, Warn("requests always share batches")).also(&["nocb"]),
    later("jinja", Nothing, AsAsked).env("LLAMA_ARG_JINJA"),
    later("no-jinja", Nothing, Warn("chat templates always run as Jinja")),
    later("mmap", Nothing, AsAsked),
    later("no-mmap", Nothing, Warn("the file is always mapped")).env("LLAMA_ARG_NO_MMAP"),
    later("mlock", Nothing, Warn("memory is not locked yet")).env("LLAMA_ARG_MLOCK"),
    later("numa", Value, Warn("memory is placed as the system does it")).env("LLAMA_ARG_NUMA"),
    later(
        "swa-full",
        Nothing,
        Warn("cells behind a window are given back; snapshots are taken where others go on"),
    ),
    later("cache-reuse", Value, SHIFTED).env("LLAMA_ARG_CACHE_REUSE").quiet(&["0"]),
    later("keep", Value, Warn("nothing is ever dropped from a full context")).quiet(&["0", "-1"]),
    later(
        "context-shift",
        Nothing,
        Refuse(
            "a full context ends the answer: what stays was computed with what would be dropped, so going on would not be exact",
        ),
    ),
    later("no-context-shift", Nothing, AsAsked),
    later("spec-draft-n-min", Value, Warn("drafts of any length are verified; the text is the same"))
        .also(&["draft-min", "draft-n-min"])
        .env("LLAMA_ARG_DRAFT_MIN")
        .quiet(&["0", "1"]),
    later("spec-draft-p-min", Value, Warn("drafts are not cut by confidence yet; the text is the same"))
        .also(&["draft-p-min"])
        .env("LLAMA_ARG_DRAFT_P_MIN")
        .quiet(&["0", "0.0"]),
    later("spec-draft-p-split", Value, Warn("drafts do not branch yet; the text is the same"))
        .also(&["draft-p-split"]),
    later("spec-branch-budget", Value, Warn("drafts do not branch yet; the text is the same"))
        .also(&["tree-budget"])
        .quiet(&["0"]),
    later("spec-draft-ctx-size", Value, WHOLE_CONTEXT)
        .also(&["cd", "ctx-size-draft"])
        .env("LLAMA_ARG_CTX_SIZE_DRAFT")
        .quiet(&["0"]),
    later("spec-dflash-cross-ctx", Value, WHOLE_CONTEXT).quiet(&["0"]),
    later("spec-draft-replace", Value, Refuse("a drafter must speak its target's vocabulary"))
        .also(&["spec-replace"]),
    later("threads-batch", Value, NO_POOLS).also(&["tb"]),
    later("spec-draft-threads", Value, NO_POOLS).also(&["td", "threads-draft"]),
    later("threads-http", Value, NO_POOLS).env("LLAMA_ARG_THREADS_HTTP"),
    later("cpu-mask", Value, NO_POOLS),
    later("cpu-range", Value, NO_POOLS),
    later("prio", Value, NO_POOLS),
    later("poll", Value, NO_POOLS),
    later("webui", Nothing, Warn("there is no web page")),
    later("no-webui", Nothing, AsAsked).env("LLAMA_ARG_NO_WEBUI"),
    later("path", Value, Warn("no files are served")),
    later("props", Nothing, Warn("settings can't be changed while serving")),
    later("timeout", Value, Warn("answers have no time limit")).also(&["to"]).env("LLAMA_ARG_TIMEOUT"),
    later("sleep-idle-seconds", Value, Warn("the model stays loaded")).quiet(&["-1"]),
    later("remap-developer-role", Nothing, AsAsked).env("LLAMA_ARG_REMAP_DEVELOPER_ROLE"),
    later("log-verbosity", Value, Warn("-v shows more, RUST_LOG chooses")).also(&["verbosity"]),
    later("log-disable", Nothing, Warn("RUST_LOG=off silences the log")),
    later("log-colors", Optional, AsAsked),
    later("log-prefix", Nothing, AsAsked),
    later("log-timestamps", Nothing, AsAsked),
    later("offline", Nothing, Warn("HF_HUB_OFFLINE=1 keeps the hub out")),
    later("perf", Nothing, AsAsked),
    later("no-perf", Nothing, AsAsked),
    later("lora", Value, Refuse("adapters are not built yet")),
    later("lora-scaled", Value, Refuse("adapters are not built yet")),
    later("control-vector", Value, Refuse("control vectors are not built yet")),
    later("mmproj", Value, Refuse("images and sound are not built yet"))
        .also(&["mm"])
        .env("LLAMA_ARG_MMPROJ"),
    later("mmproj-url", Value, Refuse("images and sound are not built yet")).also(&["mmu"]),
    later("no-mmproj", Nothing, AsAsked),
    later("grammar", Value, Refuse("grammars are not built yet")),
    later("grammar-file", Value, Refuse("grammars are not built yet")),
    later("json-schema", Value, Refuse("grammars are not built yet")),
    later("json-schema-file", Value, Refuse("grammars are not built yet")),
    later("override-kv", Value, Refuse("metadata can't be overridden yet")),
    later("mirostat", Value, Refuse("its state would make the text depend on the drafts")).quiet(&["0"]),
    later("logit-bias", Value, Refuse("give `logit_bias` with the request")),
    later("embedding", Nothing, Refuse("embeddings are not built yet"))
        .also(&["embeddings"])
        .env("LLAMA_ARG_EMBEDDINGS"),
    later("reranking", Nothing, Refuse("embeddings are not built yet"))
        .also(&["rerank"])
        .env("LLAMA_ARG_RERANKING"),
    later("pooling", Value, Refuse("embeddings are not built yet")).env("LLAMA_ARG_POOLING"),
    later("model-url", Value, Refuse("give the file with -m or the repository with -hf")).also(&["mu"]),
    later("models-dir", Value, ROUTER).env("LLAMA_ARG_MODELS_DIR"),
    later("models-preset", Value, ROUTER).env("LLAMA_ARG_MODELS_PRESET"),
    later("models-max", Value, ROUTER).env("LLAMA_ARG_MODELS_MAX"),
    later("ssl-key-file", Value, Refuse("TLS is not built yet: put a proxy in front"))
        .env("LLAMA_ARG_SSL_KEY_FILE"),
    later("ssl-cert-file", Value, Refuse("TLS is not built yet: put a proxy in front"))
        .env("LLAMA_ARG_SSL_CERT_FILE"),
    later("api-prefix", Value, Refuse("put a proxy in front")).env("LLAMA_ARG_API_PREFIX"),
];

/// Those that were given, with their values.
#[derive(Clone, Debug, Default)]
pub struct LaterFlags {
    given: Vec<(&'static str, Option<String>)>,
}

impl LaterFlags {
    /// What to tell the user, one line each; an error if the start must be refused.
    pub fn check(&self) -> Result<Vec<String>> {
        let mut words = Vec::new();
        for (name, value) in &self.given {
            let Some(later) = LATER.iter().find(|later| later.name == *name) else { continue };
            let quiet = value.as_deref().is_some_and(|value| later.quiet.contains(&value));
            let shown = value.as_ref().map_or(String::new(), |value| format!(" {value}"));
            match later.instead {
                _ if quiet => {}
                AsAsked => {}
                Warn(instead) => words.push(format!("--{name}{shown}: {instead}")),
                Refuse(why) => bail!("--{name}{shown}: not supported: {why}"),
            }
        }
        Ok(words)
    }
}

impl Args for LaterFlags {
    fn augment_args(mut command: Command) -> Command {
        command = command.next_help_heading("Known from llama-server, without an effect here or refused");
        for later in LATER {
            let help = match later.instead {
                AsAsked => "As it is anyway",
                Warn(instead) => instead,
                Refuse(why) => why,
            };
            let mut arg = Arg::new(later.name)
                .long(later.name)
                .aliases(later.aliases.iter().copied())
                .help(help)
                .hide_short_help(true)
                .hide_env(true);
            arg = match later.takes {
                Nothing => arg.action(ArgAction::SetTrue).value_parser(switch),
                Value => arg.action(ArgAction::Set).value_name("X").allow_hyphen_values(true),
                Optional => {
                    arg.action(ArgAction::Set).value_name("X").num_args(0..=1).default_missing_value("on")
                }
            };
            if let Some(name) = later.env {
                arg = arg.env(name);
            }
            command = command.arg(arg);
        }
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        LaterFlags::augment_args(command)
    }
}

impl FromArgMatches for LaterFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<LaterFlags, Error> {
        let given = LATER.iter().filter_map(|later| match later.takes {
            Nothing => matches.get_flag(later.name).then_some((later.name, None)),
            Value | Optional => {
                matches.get_one::<String>(later.name).map(|value| (later.name, Some(value.clone())))
            }
        });
        Ok(LaterFlags { given: given.collect() })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
        *self = LaterFlags::from_arg_matches(matches)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &'static str, value: Option<&str>, expected: Result<&[&str], &str>) {
        let flags = LaterFlags { given: vec![(name, value.map(str::to_string))] };
        let got = flags.check().map_err(|e| e.to_string());
        let expected =
            expected.map(|words| words.iter().map(|w| w.to_string()).collect()).map_err(str::to_string);
        assert_eq!(got, expected);
    }

    #[test]
    fn nothing_is_ignored_in_silence() {
        check(
            "n-gpu-layers",
            Some("99"),
            Ok(&["--n-gpu-layers 99: this build computes on the CPU, where all layers stay"]),
        );
        check("n-gpu-layers", Some("0"), Ok(&[]));
        check("cont-batching", None, Ok(&[]));
        check("lora", Some("a.gguf"), Err("--lora a.gguf: not supported: adapters are not built yet"));
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<&str> =
            LATER.iter().flat_map(|l| l.aliases.iter().copied().chain([l.name])).collect();
        names.sort_unstable();
        let n = names.len();
        names.dedup();
        assert_eq!(names.len(), n);
    }
}
