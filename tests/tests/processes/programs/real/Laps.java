// Four threads, each with a voice of its own, a heap that is collected all the time, and a lock that they share.
import java.io.*;
import java.nio.channels.Pipe;
import java.security.MessageDigest;
import java.util.*;

public class Laps {
    static final Object lock = new Object();
    static final long[] laps = new long[4];
    static long all = 0;
    // java.nio keeps an end of a pair of sockets whose other end it closes.
    static Pipe pipe;

    static void die(String why) {
        System.out.println(why);
        System.out.flush();
        Runtime.getRuntime().halt(3);
    }

    static String hex(MessageDigest digest) {
        byte[] bytes = digest.digest();
        StringBuilder text = new StringBuilder();
        for (int k = 0; k < 8; k++) text.append(String.format("%02x", bytes[k]));
        return text.toString();
    }

    static void run(int k) throws Exception {
        File path = new File("/srv/said." + k), old = new File("/srv/said." + k + ".old");
        Random random = new Random(k + 1);
        byte[][] heap = new byte[100][];
        for (int n = 0; n < 100; n++) heap[n] = new byte[0];
        String line = "";
        for (long lap = 1; ; lap++) {
            if (!line.isEmpty()) {
                String last = "";
                try (BufferedReader held = new BufferedReader(new FileReader(path))) {
                    for (String next = held.readLine(); next != null; next = held.readLine()) last = next;
                }
                if (!last.equals(line)) die(k + " is at " + line + " and its file at " + last);
            }
            synchronized (lock) {
                long sum = 0;
                for (long one : laps) sum += one;
                if (sum != all || laps[k] + 1 != lap) die(k + " is at " + lap + ", all at " + Arrays.toString(laps));
                laps[k]++;
                all++;
            }
            MessageDigest numbers = MessageDigest.getInstance("SHA-256"), whole = MessageDigest.getInstance("SHA-256");
            for (int n = 0; n < 16; n++) {
                int number = random.nextInt();
                numbers.update((byte) (number >> 8));
                if (n < 4) {
                    byte[] block = new byte[Math.floorMod(number, 20000)];
                    Arrays.fill(block, (byte) number);
                    heap[Math.floorMod(number >> 3, 100)] = block;
                }
            }
            for (byte[] block : heap) whole.update(block);
            if (lap % 1000 == 0 && !path.renameTo(old)) die(k + " cannot rename");
            line = lap + " " + System.currentTimeMillis() + " " + lap * 3 + " " + hex(numbers) + " " + hex(whole);
            try (FileOutputStream said = new FileOutputStream(path, true)) { said.write((line + "\n").getBytes("UTF-8")); }
            if (lap % 20 == k) Thread.sleep(2);
        }
    }

    public static void main(String[] words) throws Exception {
        pipe = Pipe.open();
        for (int k = 1; k < 4; k++) {
            int which = k;
            new Thread(() -> {
                try { run(which); } catch (Throwable error) { error.printStackTrace(System.out); die(which + ": " + error); }
            }).start();
        }
        try { run(0); } catch (Throwable error) { error.printStackTrace(System.out); die("0: " + error); }
    }
}
