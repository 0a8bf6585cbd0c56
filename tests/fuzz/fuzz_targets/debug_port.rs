#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if let Some(target) = fuzz::target("debug_port") {
        (target.run)(data);
    }
});
