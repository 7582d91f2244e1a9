//! Archives that are damaged: refused whole.

use super::*;

/// A small archive with extension headers, without the padding that tar adds after the mark.
fn small_archive() -> Vec<u8> {
    Tar::default()
        .dir("d")
        .pax(&[("mtime", b"7.5"), ("SCHILY.xattr.user.k", b"v")])
        .file("d/f", &[b'x'; 700])
        .raw(b'L', "././@LongLink", "", &[b'n'; 150])
        .file("n", b"long")
        .symlink("s", "d/f")
        .link("l", "d/f")
        .end()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
    encoder.include_checksum(true).unwrap();
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn xz(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 6);
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[track_caller]
fn assert_refused_at(store: &Store, bytes: &[u8], what: &str, at: usize) {
    assert!(store.import_bytes(bytes).is_err(), "{what} at {at} was taken");
    store.assert_empty();
}

#[test]
fn every_truncation_is_refused() {
    let store = Store::new();
    let whole = small_archive();
    store.import_bytes(&whole).unwrap();
    store.bases.remove("img").unwrap();
    for len in (0..whole.len()).filter(|len| len % 512 == 0 || len % 37 == 0) {
        assert_refused_at(&store, &whole[..len], "truncation", len);
    }
    assert_refused_at(&store, &whole[..whole.len() - 1], "truncation", whole.len() - 1);
}

#[test]
fn every_truncation_of_a_compressed_archive_is_refused() {
    let store = Store::new();
    for (name, packed) in
        [("gzip", gzip(&small_archive())), ("zstd", zstd(&small_archive())), ("xz", xz(&small_archive()))]
    {
        store.import_bytes(&packed).unwrap_or_else(|error| panic!("{name}: {error}"));
        store.bases.remove("img").unwrap();
        for len in 0..packed.len() {
            assert_refused_at(&store, &packed[..len], name, len);
        }
    }
}

#[test]
fn every_flipped_bit_of_a_header_is_refused() {
    let store = Store::new();
    let whole = small_archive();
    store.import_bytes(&whole).unwrap();
    let good = look_at(&store.tree("img"), 100_000);
    store.bases.remove("img").unwrap();
    // The headers of `d`, of the extension, of `d/f`, of the long name.
    for header in [0, 512, 1536, 3072] {
        for at in header..header + 512 {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            if store.import_bytes(&flipped).is_ok() {
                // A leading zero of the checksum may be a space, and what ends its digits means nothing.
                assert!((148..156).contains(&(at - header)), "a flip at {at} was taken");
                assert_same(&look_at(&store.tree("img"), 100_000), &good);
                store.bases.remove("img").unwrap();
            }
            store.assert_empty();
        }
    }
}

#[test]
fn every_flipped_bit_of_a_compressed_archive_is_refused_or_harmless() {
    let store = Store::new();
    for (name, packed) in
        [("gzip", gzip(&small_archive())), ("zstd", zstd(&small_archive())), ("xz", xz(&small_archive()))]
    {
        store.import_bytes(&packed).unwrap();
        let good = look_at(&store.tree("img"), 100_000);
        store.bases.remove("img").unwrap();
        let mut n_taken = 0;
        for at in 0..packed.len() {
            let mut flipped = packed.clone();
            flipped[at] ^= 1 << (at % 8);
            if store.import_bytes(&flipped).is_ok() {
                assert_same(&look_at(&store.tree("img"), 100_000), &good);
                store.bases.remove("img").unwrap();
                n_taken += 1;
            }
            store.assert_empty();
        }
        // gzip: time, system and flags of its header, which it does not check.
        assert!(n_taken <= 10, "{n_taken} of {} flips of {name} were taken", packed.len());
    }
}

#[test]
fn what_follows_the_end_may_only_be_zeros() {
    let store = Store::new();
    let mut padded = small_archive();
    padded.resize(padded.len().next_multiple_of(10_240) + 3, 0);
    store.import_bytes(&padded).unwrap();
    store.bases.remove("img").unwrap();
    for at in [padded.len() - 1, small_archive().len(), small_archive().len() - 1] {
        let mut garbage = padded.clone();
        garbage[at] = 1;
        store.assert_refused(&garbage, "after the end-of-archive mark");
    }
    store.assert_refused(&[small_archive(), small_archive()].concat(), "after the end-of-archive mark");
}

#[test]
fn malformed_entries_are_refused_with_their_name() {
    let store = Store::new();
    for (tar, why) in [
        (Tar::default().raw(b'M', "f", "", b""), "multi-volume"),
        (Tar::default().raw(b'Q', "f", "", b""), "unknown type"),
        (Tar::default().raw(b'x', "x", "", b"99 path=f\n").file("f", b""), "malformed extension"),
        (Tar::default().pax(&[("size", b"-1")]).file("f", b""), "size"),
        (Tar::default().pax(&[("size", b"9223372036854775808")]).file("f", b""), "size too large"),
        (Tar::default().pax(&[("uid", b"root")]).file("f", b""), "uid"),
        (Tar::default().pax(&[("mtime", b"now")]).file("f", b""), "mtime"),
        (Tar::default().pax(&[("path", b"g")]).pax(&[("path", b"h")]).file("f", b""), "two extension headers"),
        (Tar::default().file("f", b"").pax(&[("path", b"g")]), "without its entry"),
        (Tar::default().symlink("f", ""), "symlink"),
        (Tar::default().file(&"n".repeat(100), b"").pax(&[("path", &[b'n'; 256])]).file("f", b""), "create"),
        (Tar::default().pax(&[("path", &[b'n'; 5000])]).file("f", b""), "4000"),
        (Tar::default().pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.realsize", b"1")]).file("f", b""), "sparse"),
        (
            Tar::default().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"5,3,4,1")]).file("f", b"1234"),
            "unordered",
        ),
        (Tar::default().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"8,4")]).file("f", b"1234"), "beyond"),
        (Tar::default().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,3")]).file("f", b"1234"), "fit"),
        (Tar::default().pax(&[("GNU.sparse.size", b"9"), ("GNU.sparse.map", b"0,3,")]).file("f", b"123"), "sparse"),
        (
            Tar::default()
                .pax(&[("GNU.sparse.size", b"18446744073709551615"), ("GNU.sparse.map", b"0,3")])
                .file("f", b"123"),
            "sparse",
        ),
    ] {
        store.assert_refused(&tar.end(), why);
    }
}
