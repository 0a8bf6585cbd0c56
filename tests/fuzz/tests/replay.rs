//! Every committed input of every target, and mutations of them: what a fuzzer
//! once found stays found, and a target that breaks at once is seen without one.
#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use fuzz::{TARGETS, Target};

/// Mutated inputs of each target; a real run is `cargo xtask fuzz`.
const MUTATIONS: u32 = 300;

fn corpus(target: Target) -> Vec<(PathBuf, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("corpus")
        .join(target.name);
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|file| {
            let data = fs::read(&file).unwrap();
            (file, data)
        })
        .collect()
}

/// xorshift64*: the runs repeat.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }

    fn mutate(&mut self, mut data: Vec<u8>) -> Vec<u8> {
        for _ in 0..=self.below(4) {
            let at = self.below(data.len());
            match (self.below(5), data.get_mut(at)) {
                (0, Some(byte)) => *byte ^= 1 << self.below(8),
                (1, Some(byte)) => *byte = [0, 1, 0x7f, 0x80, 0xff][self.below(5)],
                (2, Some(_)) => drop(data.remove(at)),
                (3, _) => data.insert(at, self.below(256) as u8),
                _ => data.truncate(at),
            }
        }
        data
    }
}

#[test]
fn every_target_stands_its_corpus_and_mutations_of_it() {
    for target in TARGETS {
        let inputs = corpus(*target);
        assert!(!inputs.is_empty(), "{} has no corpus", target.name);
        for (file, data) in &inputs {
            // The name of the input that breaks it must be seen.
            println!("{}", file.display());
            (target.run)(data);
        }
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        for n in 0..MUTATIONS {
            let (file, data) = &inputs[random.below(inputs.len())];
            println!("mutation {n} of {}", file.display());
            (target.run)(&random.mutate(data.clone()));
        }
    }
}

/// A target without its program cannot be run by a fuzzer.
#[test]
fn every_target_has_its_program_and_every_folder_its_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(root.join("Cargo.toml")).unwrap();
    for target in TARGETS {
        let name = target.name;
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name}");
        let program = fs::read_to_string(root.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(program.contains(&format!("\"{name}\"")), "{name}");
    }
    for entry in fs::read_dir(root.join("corpus")).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(fuzz::target(&name.to_string_lossy()).is_some(), "{name:?}");
    }
}
