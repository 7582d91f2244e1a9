import zipfile

PIP = ['/usr/bin/python3', '-m', 'pip', '--disable-pip-version-check', '--no-cache-dir', '-q']
package = os.environ.get('PACKAGE')
if not package:
    # A wheel of our own: needs no index and no network.
    package = '/srv/work/many-1.0-py3-none-any.whl'
    with zipfile.ZipFile(package, 'w', zipfile.ZIP_DEFLATED) as wheel:
        for k in range(300):
            wheel.writestr(f'many/m{k}.py', f'# {bytes_of(500, k).hex()}\nvalue = {k}\n')
        wheel.writestr('many/__init__.py', 'from importlib import import_module\n'
                       'total = sum(import_module(f"many.m{k}").value for k in range(300))\n')
        wheel.writestr('many-1.0.dist-info/METADATA', 'Metadata-Version: 2.1\nName: many\nVersion: 1.0\n')
        wheel.writestr('many-1.0.dist-info/WHEEL', 'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n')
        wheel.writestr('many-1.0.dist-info/RECORD', '')

def one(n):
    where = 'toolz' if os.environ.get('PACKAGE') else 'many'
    more = [] if os.environ.get('PACKAGE') else ['--no-index', '--root-user-action=ignore']
    run(*PIP, 'install', *more, '--no-compile', '--target', 'site', package)
    if n == 0:
        print(digest('site'))
    say = 'import many; print(many.total)' if where == 'many' else 'import toolz; print(toolz.frequencies("abca"))'
    print(n, run('/usr/bin/python3', '-B', '-c', say, env={**os.environ, 'PYTHONPATH': '/srv/work/site'}))
    shutil.rmtree('site')

rounds(one)
print(sorted(os.listdir('.')))
