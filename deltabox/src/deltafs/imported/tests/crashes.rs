//! Imports that fail or die at a named point, and how much memory they take: each in a process of its own.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output, Stdio};

use super::*;

const SOURCE: &str = "DELTABOX_TEST_IMPORT_SOURCE";
const BASES: &str = "DELTABOX_TEST_IMPORT_BASES";

/// Not a test: what the tests below run in a process of its own.
#[test]
#[ignore = "run by the other tests of this file"]
fn child() {
    let (Ok(source), Ok(bases)) = (std::env::var(SOURCE), std::env::var(BASES)) else {
        panic!("{SOURCE} and {BASES} must be set: this is run by the other tests");
    };
    let bases = ImportedBases::at(Path::new(&bases));
    let (before, mapped_before) = (status_kib("VmHWM"), status_kib("RssFile"));
    match std::env::var("DELTABOX_TEST_REMOVE") {
        Ok(name) => bases.remove(&name).unwrap(),
        Err(_) => drop(bases.import("img", Path::new(&source)).unwrap()),
    }
    // The program's own text, read in as it is used, is no memory of the import's.
    let mapped = status_kib("RssFile").saturating_sub(mapped_before);
    println!("grown by {} KiB", (status_kib("VmHWM") - before).saturating_sub(mapped));
}

fn status_kib(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse().unwrap()
}

fn child_command(store: &Store, source: &Path, fault: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let name = concat!(module_path!(), "::child").split_once("::").unwrap().1;
    command.args(["--exact", name, "--ignored", "--nocapture", "--test-threads=1"]);
    command.env(SOURCE, source).env(BASES, store.path("store/bases")).env("DELTABOX_FAULT", fault);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn run_child(store: &Store, source: &Path, fault: &str) -> Output {
    let output = child_command(store, source, fault).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("running 1 test"), "the child was not found: {text}");
    output
}

fn small_source(store: &Store) -> PathBuf {
    let source = store.path("small.tar");
    fs::write(&source, Tar::default().file("d/f", b"content").end()).unwrap();
    source
}

#[test]
fn an_import_that_fails_at_any_point_leaves_nothing() {
    let store = Store::new();
    let source = small_source(&store);
    for point in ["import.times", "import.manifest", "import.rename", "import.sync_parent"] {
        let output = run_child(&store, &source, point);
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        assert!(!output.status.success() && text.contains(point), "{point}: {text}");
        store.assert_empty();
    }
}

#[test]
fn an_import_killed_before_its_rename_leaves_only_staging() {
    let store = Store::new();
    let source = small_source(&store);
    for point in ["import.times", "import.manifest", "import.rename"] {
        let output = run_child(&store, &source, &format!("{point}:kill"));
        assert_eq!(output.status.signal(), Some(libc::SIGKILL), "{point}");
        assert_eq!(store.bases.list().unwrap(), [], "{point}");
        assert_eq!(store.bases.clean().unwrap(), 1, "{point}");
        store.assert_empty();
    }
}

#[test]
fn an_import_killed_after_its_rename_is_whole() {
    let store = Store::new();
    let output = run_child(&store, &small_source(&store), "import.sync_parent:kill");
    assert_eq!(output.status.signal(), Some(libc::SIGKILL));
    assert_eq!(store.bases.clean().unwrap(), 0);
    assert_eq!(store.bases.list().unwrap().len(), 1);
    assert_eq!(fs::read(store.tree("img").join("d/f")).unwrap(), b"content");
}

#[test]
fn a_removal_that_fails_or_dies_has_removed_and_is_cleaned_up() {
    for fault in ["base_remove.delete", "base_remove.delete:kill"] {
        let store = Store::new();
        let source = small_source(&store);
        store.bases.import("img", &source).unwrap();
        let output = child_command(&store, &source, fault).env("DELTABOX_TEST_REMOVE", "img").output().unwrap();
        assert!(!output.status.success(), "{fault}");
        assert_eq!(store.bases.list().unwrap(), [], "{fault}");
        assert_eq!(store.bases.clean().unwrap(), 1, "{fault}");
        store.assert_empty();
    }
}

#[test]
fn an_import_killed_at_any_moment_leaves_a_whole_base_or_none() {
    let store = Store::new();
    let source = store.path("source");
    for i in 0..3_000 {
        fs::create_dir_all(source.join(format!("d{}", i % 100))).unwrap();
        fs::write(source.join(format!("d{}/f{i}", i % 100)), vec![1; i]).unwrap();
    }
    let expected = look_at(&source, 0);
    let mut n_killed = 0;
    for round in 0..12_u64 {
        let mut child = child_command(&store, &source, "").spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(15 + round * 25));
        let killed = child.kill();
        let status = child.wait().unwrap();
        n_killed += usize::from(killed.is_ok() && status.signal() == Some(libc::SIGKILL));
        for base in store.bases.list().unwrap() {
            assert_same(&look_at(&store.tree(&base.name), 100_000), &expected);
            store.bases.remove(&base.name).unwrap();
        }
        store.bases.clean().unwrap();
        store.assert_empty();
    }
    assert!(n_killed > 0, "no child was killed in time");
}

#[test]
fn a_running_import_is_not_cleaned_away() {
    let store = Store::new();
    fs::create_dir_all(store.path("store/bases")).unwrap();
    let staging = Staging::make(&store.path("store/bases")).unwrap();
    assert_eq!(store.bases.clean().unwrap(), 0);
    assert!(staging.path.exists());
    drop(staging);
    store.assert_empty();
}

#[test]
fn memory_does_not_grow_with_the_archive() {
    let store = Store::new();
    let (plain, packed, directory) = (store.path("plain.tar"), store.path("packed.tar.gz"), store.path("directory"));
    // 200 MB of zeros in one entry, a hole in the archive; then many small entries.
    let len = 200_000_000_u64;
    let mut header = ::tar::Header::new_ustar();
    header.set_path("zeros").unwrap();
    header.set_size(len);
    header.set_mode(0o644);
    header.set_cksum();
    let mut many = Tar::default();
    for i in 0..20_000 {
        many = many.file(&format!("d{}/f{i}", i % 100), b"small");
    }
    let many = many.end();
    let mut file = File::create(&plain).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(512 + len.next_multiple_of(512)).unwrap();
    std::io::Seek::seek(&mut file, io::SeekFrom::End(0)).unwrap();
    file.write_all(&many).unwrap();
    let encoder = flate2::write::GzEncoder::new(File::create(&packed).unwrap(), flate2::Compression::fast());
    let mut encoder = io::BufWriter::new(encoder);
    io::copy(&mut File::open(&plain).unwrap(), &mut encoder).unwrap();
    encoder.into_inner().unwrap().finish().unwrap();
    fs::create_dir(&directory).unwrap();
    fs::copy(&plain, directory.join("file")).unwrap();

    for source in [&plain, &packed, &directory] {
        let output = run_child(&store, source, "");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let grown = text.split("grown by ").nth(1).and_then(|rest| rest.split(' ').next()).unwrap();
        let grown: u64 = grown.parse().unwrap();
        assert!(grown < 8 << 10, "{} took {grown} KiB more", source.display());
        store.bases.remove("img").unwrap();
    }
}
