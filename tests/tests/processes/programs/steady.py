# Answers questions that it finds in a file, and holds what it is told in its memory only.
import json, os, time

scope, seen = {'os': os}, None
while True:
    try:
        with open('/srv/question') as f:
            text = f.read()
    except FileNotFoundError:
        text = ''
    if text.endswith('\n') and text != seen:
        seen = text
        number, told, asked = json.loads(text)
        exec(told, scope)
        with open('/srv/answer.new', 'w') as f:
            json.dump([number, eval(asked, scope)], f)
        os.rename('/srv/answer.new', '/srv/answer')
    time.sleep(0.005)
