//! Generates the messages of `proto/`: the parts of others' protocols that no crate has.

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=proto");
    let out_dir = std::env::var("OUT_DIR")?;
    Codegen::new()
        .out_dir(out_dir)
        .inputs(["proto/cri.proto", "proto/runtimeoptions.proto"])
        .include("proto")
        .rust_protobuf()
        .customize(Customize { async_all: true, gen_mod: true, ..Default::default() })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(true))
        .run()?;
    Ok(())
}
