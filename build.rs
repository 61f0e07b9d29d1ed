//! Compiles the C++ half of src/torch against the libtorch that torch-sys found.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "python")]
    bridge();
}

#[cfg(feature = "python")]
fn bridge() {
    use std::path::PathBuf;

    const SOURCES: [&str; 5] = [
        "src/torch/bridge.cpp",
        "src/torch/device.cpp",
        "src/torch/node.cpp",
        "src/torch/team.cpp",
        "src/torch/unpack.cpp",
    ];
    for source in SOURCES {
        println!("cargo:rerun-if-changed={source}");
    }
    println!("cargo:rerun-if-changed=src/torch/failure.h");
    println!("cargo:rerun-if-env-changed=DEP_TCH_LIBTORCH_LIB");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB") else {
        panic!("torch-sys did not say where libtorch is; is torch 2.11 installed in this Python?");
    };
    let include = PathBuf::from(lib).join("../include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .pic(true)
        // Only torch's own headers warn.
        .warnings(false)
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .include(python_include())
        .files(SOURCES)
        .compile("tllib_rs_bridge");
    let target_os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    if target_os == "macos" {
        // Python's symbols come from the interpreter that loads us.
        println!("cargo:rustc-cdylib-link-arg=-undefined");
        println!("cargo:rustc-cdylib-link-arg=dynamic_lookup");
    } else {
        // torch-sys names libtorch_cuda where it exists. Nothing of it is used here, so it must not
        // become a load-time dependency: one wheel serves CPU and CUDA builds of torch.
        println!("cargo:rustc-cdylib-link-arg=-Wl,--as-needed");
    }
    println!(
        "cargo:rustc-env=TLLIB_RS_TARGET={}",
        std::env::var("TARGET").unwrap_or_default()
    );
    println!(
        "cargo:rustc-env=TLLIB_RS_PROFILE={}",
        std::env::var("PROFILE").unwrap_or_default()
    );
    println!("cargo:rustc-env=TLLIB_RS_RUSTC={}", rustc_version());
}

/// Where `Python.h` is, according to the interpreter that torch-sys asks for torch.
#[cfg(feature = "python")]
fn python_include() -> String {
    println!("cargo:rerun-if-env-changed=VIRTUAL_ENV");
    let name = match std::env::var_os("VIRTUAL_ENV") {
        Some(_) => "python",
        None => "python3",
    };
    let script = "import sysconfig; print(sysconfig.get_path('include'))";
    let output = std::process::Command::new(name)
        .args(["-c", script])
        .output();
    match output.map(|o| String::from_utf8(o.stdout)) {
        Ok(Ok(path)) if !path.trim().is_empty() => path.trim().to_owned(),
        other => panic!("{name} did not say where Python.h is: {other:?}"),
    }
}

#[cfg(feature = "python")]
fn rustc_version() -> String {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    std::process::Command::new(rustc)
        .arg("--version")
        .output()
        .ok()
        .and_then(|o| String::from_utf8(o.stdout).ok())
        .map_or_else(|| "unknown".to_owned(), |s| s.trim().to_owned())
}
