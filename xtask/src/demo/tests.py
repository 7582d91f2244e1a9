"""Runs the project's own tests, without any framework: prints how many there are, and which fail."""
import glob, importlib, json, os, sys, tempfile

sys.path.insert(0, '/srv/project')
failing, n = [], 0
for path in sorted(glob.glob('/srv/project/toolz/tests/test_*toolz.py')):
    name = os.path.basename(path)[:-3]
    module = importlib.import_module('toolz.tests.' + name)
    for key, value in sorted(vars(module).items()):
        if key.startswith('test_') and callable(value):
            n += 1
            try: value()
            except BaseException: failing.append(key)
# Side effects, which a bracket undoes: byte code beside the sources, and these.
with open('/srv/project/results.log', 'a') as log: log.write(json.dumps(failing) + '\n')
tempfile.mkstemp(dir='/srv/project')
print(json.dumps({'n': n, 'failing': failing}))
