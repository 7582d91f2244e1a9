//! Rust source as tokens: enough to tell code from comments, strings from names, and tests from the rest.

/// One file's tokens.
pub(super) struct Source<'t> {
    pub(super) tokens: Vec<Token<'t>>,
    pub(super) n_lines: usize,
    /// First and last line of each test item, ascending.
    test_lines: Vec<(usize, usize)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token<'t> {
    pub(super) kind: Kind<'t>,
    /// From 1.
    pub(super) line: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind<'t> {
    /// A name or keyword.
    Word(&'t str),
    /// What stands between the quotes, escapes as written.
    Str(&'t str),
    Punct(char),
}

impl<'t> Source<'t> {
    pub(super) fn read(text: &'t str) -> Self {
        let tokens = read_tokens(text);
        let n_lines = text.lines().count();
        let test_lines = find_test_lines(&tokens, n_lines);
        Self { tokens, n_lines, test_lines }
    }

    /// Whether the line belongs to an item that is compiled for tests only.
    pub(super) fn is_test(&self, line: usize) -> bool {
        self.test_lines.iter().any(|(first, last)| (*first..=*last).contains(&line))
    }

    /// Number of lines outside test items.
    pub(super) fn n_code_lines(&self) -> usize {
        (1..=self.n_lines).filter(|line| !self.is_test(*line)).count()
    }

    /// Whether `pattern` begins at token `at`; each of its words is a name or one punctuation character.
    pub(super) fn matches(&self, at: usize, pattern: &[&str]) -> bool {
        pattern.iter().enumerate().all(|(i, wanted)| match self.tokens.get(at + i).map(|token| token.kind) {
            Some(Kind::Word(word)) => word == *wanted,
            Some(Kind::Punct(c)) => wanted.chars().eq([c]),
            Some(Kind::Str(_)) | None => false,
        })
    }

    /// The name at token `at`.
    pub(super) fn word(&self, at: usize) -> Option<&'t str> {
        match self.tokens.get(at)?.kind {
            Kind::Word(word) => Some(word),
            Kind::Str(_) | Kind::Punct(_) => None,
        }
    }
}

fn read_tokens(text: &str) -> Vec<Token<'_>> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let (len, kind) = if rest.starts_with("//") {
            (rest.find('\n').unwrap_or(rest.len()), None)
        } else if rest.starts_with("/*") {
            (block_comment_len(rest), None)
        } else if let Some((len, content)) = string(rest) {
            (len, Some(Kind::Str(content)))
        } else if let Some(len) = quoted_char_len(rest) {
            (len, None)
        } else if is_word(c) {
            let len = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
            (len, (!c.is_ascii_digit()).then_some(Kind::Word(&rest[..len])))
        } else {
            (c.len_utf8(), (!c.is_whitespace()).then_some(Kind::Punct(c)))
        };
        tokens.extend(kind.map(|kind| Token { kind, line }));
        line += rest[..len].matches('\n').count();
        at += len;
    }
    tokens
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Length of the comment at the start, with those inside it.
fn block_comment_len(rest: &str) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        let tail = &rest.as_bytes()[at..];
        if tail.starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if tail.starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    rest.len()
}

/// Length and content of the string literal of any kind at the start.
fn string(rest: &str) -> Option<(usize, &str)> {
    let prefix_len = rest.find(|c: char| !matches!(c, 'b' | 'c' | 'r')).filter(|len| *len <= 2)?;
    let is_raw = rest[..prefix_len].contains('r');
    let after_prefix = &rest[prefix_len..];
    let n_hashes = if is_raw { after_prefix.find(|c| c != '#')? } else { 0 };
    let body = after_prefix[n_hashes..].strip_prefix('"')?;
    let begin = prefix_len + n_hashes + 1;
    let end = if is_raw {
        let close = format!("\"{}", "#".repeat(n_hashes));
        body.find(&close).map(|len| (len, close.len()))
    } else {
        let mut escaped = false;
        let close = body.find(|c| {
            let closes = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            closes
        });
        close.map(|len| (len, 1))
    };
    let (content_len, close_len) = end.unwrap_or((body.len(), 0));
    Some((begin + content_len + close_len, &body[..content_len]))
}

/// Length of the character literal or lifetime at the start: neither says anything to a rule.
fn quoted_char_len(rest: &str) -> Option<usize> {
    let body = rest.strip_prefix("b'").or_else(|| rest.strip_prefix('\''))?;
    let prefix_len = rest.len() - body.len();
    let mut chars = body.char_indices();
    let (_, first) = chars.next()?;
    if first == '\\' {
        let (escaped, _) = chars.next()?;
        // The character after the backslash may be the quote itself.
        let close = body.get(escaped + 1..)?.find('\'')?;
        return Some(prefix_len + escaped + 1 + close + 1);
    }
    match chars.next() {
        Some((close, '\'')) => Some(prefix_len + close + 1),
        _ => Some(prefix_len + body.find(|c| !is_word(c)).unwrap_or(body.len())),
    }
}

/// Finds items under `#[test]` or a `#[cfg(..test..)]` without `not`.
fn find_test_lines(tokens: &[Token<'_>], n_lines: usize) -> Vec<(usize, usize)> {
    let is = |at: usize, c: char| tokens.get(at).is_some_and(|token| token.kind == Kind::Punct(c));
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let is_inner = is(at, '#') && is(at + 1, '!');
        let open = if is_inner { at + 2 } else { at + 1 };
        if !(is(at, '#') && is(open, '[')) {
            at += 1;
            continue;
        }
        let attribute_end = group_end(tokens, open);
        if !is_test_attribute(&tokens[open + 1..attribute_end.min(tokens.len())]) {
            at = attribute_end;
            continue;
        }
        if is_inner {
            return vec![(1, n_lines)];
        }
        let end = item_end(tokens, attribute_end);
        found.push((tokens[at].line, tokens.get(end - 1).map_or(n_lines, |token| token.line)));
        at = end;
    }
    found
}

fn is_test_attribute(tokens: &[Token<'_>]) -> bool {
    let has = |word| tokens.iter().any(|token| token.kind == Kind::Word(word));
    match tokens.first().map(|token| token.kind) {
        Some(Kind::Word("test")) => tokens.len() <= 2,
        Some(Kind::Word("cfg")) => has("test") && !has("not"),
        _ => false,
    }
}

/// Index after the group that opens at `open`.
fn group_end(tokens: &[Token<'_>], open: usize) -> usize {
    let mut depth = 0_usize;
    for (i, token) in tokens.iter().enumerate().skip(open) {
        match token.kind {
            Kind::Punct('[' | '(' | '{') => depth += 1,
            Kind::Punct(']' | ')' | '}') => depth = depth.saturating_sub(1),
            Kind::Word(_) | Kind::Str(_) | Kind::Punct(_) => {}
        }
        if depth == 0 {
            return i + 1;
        }
    }
    tokens.len()
}

/// Index after the item at `at`, which ends with a `;` or a block.
fn item_end(tokens: &[Token<'_>], mut at: usize) -> usize {
    while let Some(token) = tokens.get(at) {
        match token.kind {
            Kind::Punct(';') => return at + 1,
            Kind::Punct('{') => return group_end(tokens, at),
            Kind::Punct('[' | '(') => at = group_end(tokens, at),
            Kind::Word(_) | Kind::Str(_) | Kind::Punct(_) => at += 1,
        }
    }
    tokens.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<&str> {
        let source = Source::read(text);
        (0..source.tokens.len()).filter_map(|at| source.word(at)).collect()
    }

    fn strings(text: &str) -> Vec<&str> {
        let kinds = read_tokens(text).into_iter().map(|token| token.kind);
        kinds.filter_map(|kind| if let Kind::Str(content) = kind { Some(content) } else { None }).collect()
    }

    #[test]
    fn comments_and_literals_hold_no_words() {
        let text =
            "a // x\n/* x /* x */ x */ b \"x \\\" x\" c r#\"x \" x\"# d 'x' e '\\'' f b'x' g '\\u{78}' h b\"x\" i";
        assert_eq!(words(text), ["a", "b", "c", "d", "e", "f", "g", "h", "i"]);
    }

    #[test]
    fn lifetimes_are_no_open_quotes() {
        assert_eq!(
            words("fn f<'a>(x: &'a str, y: &'static str) { 'é'; r#type }"),
            ["fn", "f", "x", "str", "y", "str", "r", "type"]
        );
    }

    #[test]
    fn strings_of_every_kind_give_their_content() {
        assert_eq!(
            strings(r####"("a", b"b", c"c", r"d\", br##"e"#f"##, "g\"h", "", r"")"####),
            ["a", "b", "c", "d\\", "e\"#f", "g\\\"h", "", ""]
        );
    }

    #[test]
    fn lines_are_counted_through_strings_and_comments() {
        let source = Source::read("\"a\nb\"\n/*\n*/ x");
        assert_eq!(source.tokens.last().map(|token| token.line), Some(4));
    }

    #[test]
    fn an_unfinished_literal_ends_with_the_file() {
        for text in ["\"abc", "r#\"abc", "/* abc", "'", "'\\", "b'", "r#", "é'", "#[cfg(test"] {
            Source::read(text);
        }
    }

    #[test]
    fn test_items_are_told_from_the_rest() {
        let text = "fn a() {}\n#[cfg(test)]\n#[allow(x)]\nmod tests {\n fn f(x: [u8; 4]) {}\n}\nfn b() {}\n#[test]\nfn t(\
                    ) {}\n#[cfg(all(test, unix))]\nuse x;\n#[cfg(not(test))]\nfn c() {}\n";
        let source = Source::read(text);
        let tests: Vec<usize> = (1..=source.n_lines).filter(|line| source.is_test(*line)).collect();
        assert_eq!(tests, [2, 3, 4, 5, 6, 8, 9, 10, 11]);
        assert_eq!(source.n_code_lines(), 4);
        assert_eq!(Source::read("#![cfg(test)]\nfn a() {}\n").n_code_lines(), 0);
    }
}
