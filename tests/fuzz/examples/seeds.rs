//! Writes the samples of answers into a folder, as the first seeds of the target `ttlv`, if each gets as far as it should.

use keyferry_fuzz::source::dsm::mutations::{oracle::check, samples};
use std::path::PathBuf;

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("corpus/ttlv"), PathBuf::from);
    std::fs::create_dir_all(&folder)?;
    for sample in samples::all() {
        assert_eq!(check(&sample.bytes), sample.reaches, "{}", sample.name);
        std::fs::write(folder.join(sample.name), sample.bytes)?;
    }
    Ok(())
}
