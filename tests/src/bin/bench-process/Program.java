// The measured program for a JVM, as program.py: MB, every how many pages one is written, `told` or `still`.
import java.io.FileOutputStream;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.Arrays;

public class Program {
    static void say(FileOutputStream out, String words) throws IOException {
        out.write((words + "\n").getBytes());
    }

    public static void main(String[] args) throws Exception {
        int step = Integer.parseInt(args[1]);
        byte[] memory = new byte[Integer.parseInt(args[0]) << 20];
        Arrays.fill(memory, (byte) 7);
        FileOutputStream out = new FileOutputStream(java.io.FileDescriptor.out);
        byte[] one = new byte[1];
        long pid = ProcessHandle.current().pid();
        say(out, "leader " + pid);
        say(out, "ready " + pid);
        if (args[2].equals("still")) {
            Files.createFile(Path.of("/run/ready"));
            Thread.sleep(Long.MAX_VALUE);
        }
        try (var in = new java.io.FileInputStream(java.io.FileDescriptor.in)) {
            while (in.read(one) == 1) {
                long now = System.nanoTime();
                if (one[0] == 'd') {
                    for (int at = 0; at < memory.length; at += step * 4096) memory[at] = 8;
                    say(out, "gone");
                    Thread.sleep(Long.MAX_VALUE);
                }
                int wrong = 0;
                for (int at = 0; at < memory.length; at += step * 4096) wrong += memory[at] == 7 ? 0 : 1;
                say(out, "back " + now + " " + wrong);
            }
        }
    }
}
