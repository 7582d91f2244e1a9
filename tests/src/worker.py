import ast, json, os, sys, traceback

scope = {'os': os, 'sys': sys}

def run(text):
    tree = ast.parse(text)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, 'told', 'exec'), scope)
    return eval(compile(ast.Expression(last.value), 'told', 'eval'), scope) if last else None

# No buffer of Python's own between it and the descriptor: what is read was told.
def lines():
    rest = b''
    while True:
        while b'\n' not in rest:
            more = os.read(0, 65536)
            if not more:
                return
            rest += more
        line, rest = rest.split(b'\n', 1)
        yield line

for line in lines():
    try:
        answer = {'value': run(json.loads(line))}
    except BaseException:
        answer = {'error': traceback.format_exc()}
    os.write(1, json.dumps(answer).encode() + b'\n')
