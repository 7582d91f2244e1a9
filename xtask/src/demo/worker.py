"""The agent's worker: keeps an index of a project in memory, edits it, tells digests. One JSON request per line."""
import ast, hashlib, json, os, random, sys, tokenize

ROOT = '/srv/project'
FLIPS = {'==': ['!='], '!=': ['=='], '<': ['<=', '>='], '<=': ['<', '>'], '>': ['>=', '<='], '>=': ['>', '<'],
         'in': ['not in'], 'not in': ['in'], 'is': ['is not'], 'is not': ['is']}
NAMES = {ast.Eq: '==', ast.NotEq: '!=', ast.Lt: '<', ast.LtE: '<=', ast.Gt: '>', ast.GtE: '>=',
         ast.In: 'in', ast.NotIn: 'not in', ast.Is: 'is', ast.IsNot: 'is not'}
index, edits, chance = {}, [], random.Random(7)

def files():
    for place, _, names in sorted(os.walk(ROOT)):
        for name in sorted(names):
            if name.endswith('.py'): yield os.path.join(place, name)

def read(path):
    """Functions of a file, its words and where they stand, and what could be edited in it."""
    with open(path) as file: source = file.read()
    words = {}
    with open(path, 'rb') as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.NAME: words.setdefault(token.string, []).append(token.start)
    sites, lines = [], source.splitlines()
    for function in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)):
        for node in ast.walk(function):
            if isinstance(node, ast.Compare) and len(node.ops) == 1 and node.left.end_lineno == node.comparators[0].lineno:
                sites.append((function.name, node.left.end_lineno, node.left.end_col_offset,
                              node.comparators[0].col_offset, NAMES[type(node.ops[0])]))
            elif isinstance(node, ast.Constant) and type(node.value) is int:
                sites.append((function.name, node.lineno, node.col_offset, node.end_col_offset, str(node.value)))
    index[path] = {'hash': hashlib.sha256(source.encode()).hexdigest(), 'words': words, 'lines': lines, 'sites': sites}

def candidates(functions):
    found = []
    for path in sorted(index):
        if '/tests/' in path: continue
        for function, line, begin, end, old in index[path]['sites']:
            if function not in functions: continue
            text = index[path]['lines'][line - 1][begin:end]
            new = FLIPS.get(old) or [str(int(old) + 1), str(int(old) - 1)]
            found += [[path, line, begin, end, text.replace(old, one)] for one in new if old in text]
    return found

def apply(path, line, begin, end, new):
    lines = list(index[path]['lines'])
    lines[line - 1] = lines[line - 1][:begin] + new + lines[line - 1][end:]
    with open(path, 'w') as file: file.write('\n'.join(lines) + '\n')
    edits.append([path, line, begin, end, new, chance.random()])
    read(path)

def look():
    disk = hashlib.sha256()
    for path in files():
        with open(path, 'rb') as file: disk.update(path.encode() + b'\0' + file.read())
    memory = hashlib.sha256(json.dumps([index, edits, chance.getstate()], sort_keys=True).encode())
    return {'files': disk.hexdigest(), 'memory': memory.hexdigest()}

for path in files(): read(path)
rest = b''
while True:
    # No buffer of Python's own: what is read was told.
    while b'\n' not in rest:
        more = os.read(0, 65536)
        if not more: sys.exit()
        rest += more
    line, rest = rest.split(b'\n', 1)
    request = json.loads(line)
    answer = {'candidates': candidates, 'apply': apply, 'look': look}[request[0]](*request[1:])
    os.write(1, json.dumps(answer).encode() + b'\n')
